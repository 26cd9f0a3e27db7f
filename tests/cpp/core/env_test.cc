#include "core/env.h"

#include <doctest/doctest.h>

#include <map>

#include "core/error.h"

namespace deep_ep {
namespace {

using Variables = std::map<std::string, std::string>;

Environment parse(const Variables& variables) {
    return parse_environment([&variables](const char* name) -> std::optional<std::string> {
        const auto found = variables.find(name);
        return found == variables.end() ? std::nullopt : std::optional(found->second);
    });
}

std::string failure(const Variables& variables) {
    try {
        parse(variables);
    } catch (const InvalidArgument& error) {
        return error.what();
    }
    return "";
}

TEST_CASE("an empty environment gives the documented defaults") {
    const Environment env = parse({});
    CHECK(env.timeout_s == 100);
    CHECK(env.warn_s == 10);
    CHECK(env.ranks_per_node == 0);
    CHECK(env.device == "");
    CHECK(env.num_sms == 0);
    CHECK(!env.check_calls);
    CHECK(env.cpu_sms == 0);
    CHECK(env.heap == "");
    CHECK(env.rail == "");
    CHECK(env.rail_interface == "");
}

TEST_CASE("every variable reaches its field") {
    const Environment env = parse({{"DEEP_EP_TIMEOUT_SECS", "2.5"},
                                   {"DEEP_EP_WARN_SECS", "1"},
                                   {"DEEP_EP_RANKS_PER_NODE", "2"},
                                   {"DEEP_EP_DEVICE", "cpu"},
                                   {"DEEP_EP_NUM_SMS", "16"},
                                   {"DEEP_EP_LEND_BYTES", "1024"},
                                   {"DEEP_EP_COST_MODEL", " a/model.json "},
                                   {"DEEP_EP_CHECK_CALLS", "1"},
                                   {"DEEP_EP_CPU_SMS", "4"},
                                   {"DEEP_EP_HEAP", "host"},
                                   {"DEEP_EP_RAIL", "other"},
                                   {"DEEP_EP_RAIL_INTERFACE", "eth1"}});
    CHECK(env.timeout_s == 2.5);
    CHECK(env.warn_s == 1);
    CHECK(env.ranks_per_node == 2);
    CHECK(env.device == "cpu");
    CHECK(env.num_sms == 16);
    CHECK(env.lend_bytes == 1024);
    CHECK(env.cost_model == "a/model.json");
    CHECK(env.check_calls);
    CHECK(env.cpu_sms == 4);
    CHECK(env.heap == "host");
    CHECK(env.rail == "other");
    CHECK(env.rail_interface == "eth1");
}

TEST_CASE("an empty or blank value means that the variable is not set") {
    CHECK(parse({{"DEEP_EP_TIMEOUT_SECS", ""}}).timeout_s == 100);
    CHECK(parse({{"DEEP_EP_TIMEOUT_SECS", " \t"}}).timeout_s == 100);
    CHECK(parse({{"DEEP_EP_DEVICE", " cuda "}}).device == "cuda");
}

TEST_CASE("a malformed value is refused with the variable, what was expected and what was found") {
    CHECK(failure({{"DEEP_EP_TIMEOUT_SECS", "soon"}}) ==
          "DEEP_EP_TIMEOUT_SECS: expected a positive number of seconds, got 'soon'");
    CHECK(failure({{"DEEP_EP_DEVICE", "tpu"}}) ==
          "DEEP_EP_DEVICE: expected 'cpu', 'cuda' or nothing (automatic), got 'tpu'");
    CHECK(failure({{"DEEP_EP_CHECK_CALLS", "yes"}}) == "DEEP_EP_CHECK_CALLS: expected 0, 1 or nothing (0), got 'yes'");
    CHECK(failure({{"DEEP_EP_NUM_SMS", "9999"}}) ==
          "DEEP_EP_NUM_SMS: expected a number of SMs, 0 to 1024 (0: automatic), got '9999'");
    CHECK(failure({{"DEEP_EP_LEND_BYTES", "100"}}) ==
          "DEEP_EP_LEND_BYTES: expected a number of bytes, a multiple of 128, got '100'");
}

TEST_CASE("numbers with a tail, without a value or out of range are refused") {
    for (const char* text : {"10s", "0", "-1", "nan", "inf", "1e999", "1,5", "0x10"}) {
        CAPTURE(text);
        CHECK(failure({{"DEEP_EP_WARN_SECS", text}}) != "");
    }
    for (const char* text : {"2.5", "-1", "two", "99999999999", "8 8"}) {
        CAPTURE(text);
        CHECK(failure({{"DEEP_EP_RANKS_PER_NODE", text}}) != "");
    }
}

}  // namespace
}  // namespace deep_ep
