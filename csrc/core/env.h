// The environment, read once. The one place of the project that looks at DEEP_EP_* variables; docs/environment.md is
// the table for users.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>

namespace deep_ep {

struct Environment {
    double timeout_s = 100;  // DEEP_EP_TIMEOUT_SECS: after so long a wait fails
    double warn_s = 10;      // DEEP_EP_WARN_SECS: after so long a wait is reported
    int ranks_per_node = 0;  // DEEP_EP_RANKS_PER_NODE: 0 = found from the machine
    std::string device;      // DEEP_EP_DEVICE: "cpu", "cuda", or "" = chosen from what the machine has
    std::string cost_model;  // DEEP_EP_COST_MODEL: a file of deep_ep.calibrate, "off", or "" = where it is stored
    int num_sms = 0;         // DEEP_EP_NUM_SMS: SM budget of a call, 0 = what the caller or the model says
    int64_t lend_bytes =
        -1;  // DEEP_EP_LEND_BYTES: what a Buffer lends where its caller does not say, -1 = a part of it
    bool check_calls = false;    // DEEP_EP_CHECK_CALLS: the ranks compare the arguments of every call
    int cpu_sms = 0;             // DEEP_EP_CPU_SMS: SMs that the CPU device claims to have, 0 = its default
    std::string heap;            // DEEP_EP_HEAP: where a node's memory lies, "device", "host", or "" = chosen
    std::string rail;            // DEEP_EP_RAIL: the engine that carries bytes between nodes, or "" = chosen
    std::string rail_interface;  // DEEP_EP_RAIL_INTERFACE: that it listens on, a name or an address, or "" = found
};

// What this process was started with (or had set by the first call). Throws InvalidArgument when a variable is
// malformed, naming it, what was expected and what was found; the next call reads again.
const Environment& environment();

// The same from any source of variables, for tests: `find` gives a variable's value, or nothing when it is not set.
Environment parse_environment(const std::function<std::optional<std::string>(const char* name)>& find);

}  // namespace deep_ep
