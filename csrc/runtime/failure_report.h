// From a kernel's record to a sentence: which peer, at which stage, never entered or stalled.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "layout/status.h"
#include "layout/topology.h"

namespace deep_ep::runtime {

// The last call that a rank is known to have entered.
struct Progress {
    int rank;
    uint64_t call;
};

// What the rank that reports knows beside the record.
struct Peers {
    layout::Topology topology;
    std::vector<Progress> progress;                 // of all others that tell it: neighbours, rail peers
    std::function<std::string(int peer)> remark;    // put behind its name; empty: nothing is known
    std::function<std::string(int origin)> reason;  // why it gave up; empty: nothing is known
    // Across nodes, of a rank that entered the call and stalls: whom it waits for itself, as it has told; empty: nothing.
    std::function<std::string(int peer)> stall;
};

// An operation as users know it, and a stage: what it is called, and what a rank does there that others wait for.
struct StageName {
    const char* name;
    const char* awaited;
};
const char* operation_name(layout::Operation operation);
StageName stage_name(layout::Stage stage, layout::Operation operation);

// What an abort code says.
std::string describe_abort_code(uint64_t code, const layout::Topology& topology);

std::string describe_failure(const layout::WaitRecord& record, const Peers& peers);
std::string describe_warning(const layout::WaitRecord& record, const Peers& peers);
// For a rank that has no kernel that could be told: a neighbour's reason, or what came over the rail.
std::string describe_note(const layout::Topology& topology, int origin, const std::string& reason);
std::string describe_rail_abort(uint64_t code, const Peers& peers);
// A connection to another node is lost; what the engine says of it.
std::string describe_transport(const layout::Topology& topology, const std::string& text);

}  // namespace deep_ep::runtime
