// What a kernel tells the host, in host-mapped memory, and the device-local words of a Buffer.
#pragma once

#include <cstdint>

#include "layout/heap.h"

namespace deep_ep::layout {

enum class Operation : uint32_t {
    kLayout,
    kNotifyDispatch,
    kDispatch,
    kCombine,
    kLowLatencyDispatch,
    kLowLatencyCombine,
    kLowLatencyClean
};
constexpr bool is_low_latency(Operation operation) { return operation >= Operation::kLowLatencyDispatch; }

enum class Stage : uint32_t {
    kStart,
    kCounts,
    kRow,
    kSlot,
    kInput,
    kCapacity,
    kTable,
    kLoan,
    kWeights,
    kReturn,
    kPosition,
    kStated,  // kBadInput: a number in a routing table
    kClean,
    kEntry,  // kBadInput: a top-k entry that is not that of the dispatch
    kOpen,   // kBadInput: a call that this rank has not received holds the bank
    kRows,   // kBadInput: rows of a rank at another that cannot be
    // Across nodes; the peer is a rank of another node.
    kRailBank,      // it has not done with what we put there two calls ago
    kRailCounts,    // its counts have not come, over the rail or from its forwarder
    kRailChunk,     // its next chunk of tokens, or of sums, has not come
    kRailTaken,     // it has not taken out a chunk of ours
    kRailRoom,      // the engine has no room for what we post to it
    kRailShapes,    // kBadInput: its counts are of a call of another shape
    kRailCapacity,  // kBadInput: more tokens to forward than rail_head holds
    kRailRows       // kBadInput: tokens on the rail that cannot be; `token`: how many are stated
};
// Stages whose `peer` is any rank of the group where a wait names it; the others name one of this node.
constexpr bool is_rail_stage(Stage stage) { return stage >= Stage::kRailBank; }
constexpr int kNumOperations = static_cast<int>(Operation::kLowLatencyClean) + 1;
constexpr int kNumStages = static_cast<int>(Stage::kRailRows) + 1;

enum class FailureKind : uint32_t { kNone, kTimeout, kAborted, kBadInput };

// The record of one wait that failed: who waited for whom, where, for what, and how long.
struct WaitRecord {
    uint64_t state;  // 0: unused; 1: complete (written last)
    FailureKind kind;
    Operation operation;
    Stage stage;
    int32_t peer;  // of all ranks, not of the node; kBadInput in kInput: token
    uint64_t call;
    uint64_t expected;
    uint64_t seen;  // kAborted: the abort code
    uint64_t waited_ns;
    int32_t token;  // kBadInput in kPosition; in kRows: where the rows of `peer` are
};

struct HostStatus {
    WaitRecord failure;
    WaitRecord warning;
};

// Counts that the host waits for in a dispatch.
struct HostCounts {
    uint64_t entered;  // ticket of the last notify kernel that has begun
    uint64_t ready;    // ticket of the last one whose counts stand below
    int64_t num_recv_tokens;
    int32_t num_recv_per_expert[kMaxLocalExperts];  // rounded up to the alignment
    int64_t num_rail_tokens;                        // across nodes: that this rank forwards
};

// How far the blocks of one low-latency launch are. Launches use two of these in turn; each clears the other one.
struct LowLatencyLaunchState {
    uint32_t begun_blocks;
    uint32_t settled_blocks;  // will not look at the counters of LocalState again; see algo::arrive
    uint32_t next_share;      // of the receive phase
    uint32_t void_pieces;     // of a call that fails: pieces of the outputs that warps have taken to fill them with NaN
    uint32_t lists;           // of a dispatch: a bit for each list of counts that is written; kVoidLists: they are void
    uint32_t staged_rows;     // of a combine across nodes: further rows of tokens that have a place in staging

    static constexpr uint32_t kVoidLists = 1u << 31;
    static constexpr int kMaxLists = 31;
};

// How often this rank has waited for a peer at one stage of an operation, and how long. Kernels add to the words while
// anybody may read them.
struct WaitCell {
    uint64_t longest;     // wait of the last call that is counted; see make_longest_wait
    uint64_t times_late;  // calls in which a wait lasted for kLateNs or more
    uint64_t waited_ns;   // the longest wait of each of these calls, in sum
};
// Rows and flags of a call that goes well come one after the other: shorter waits say nothing of their sender. It is more
// than a whole low-latency call takes, because each look at a flag takes longer once the wait is counted.
constexpr uint64_t kLateNs = 50'000;

// One word, so that a call's longest wait and the call change together: the low bits of its number, then nanoseconds.
constexpr int kLongestWaitBits = 40;
constexpr uint64_t kMaxLongestWait = (1ull << kLongestWaitBits) - 1;
constexpr uint64_t make_longest_wait(uint64_t call, uint64_t ns) {
    return call << kLongestWaitBits | (ns < kMaxLongestWait ? ns : kMaxLongestWait);
}
constexpr uint64_t ns_of_wait(uint64_t wait) { return wait & kMaxLongestWait; }
constexpr bool is_same_call(uint64_t wait, uint64_t other) { return (wait ^ other) >> kLongestWaitBits == 0; }

// [kNumOperations, kNumStages, num_ranks] of them; `peer` is one of all ranks.
constexpr int num_wait_cells(int num_ranks) { return kNumOperations * kNumStages * num_ranks; }
constexpr int wait_cell(Operation operation, Stage stage, int num_ranks, int peer) {
    return (static_cast<int>(operation) * kNumStages + static_cast<int>(stage)) * num_ranks + peer;
}

// Of each sequence of numbers one warning a call is told: calls of the high-throughput mode, low-latency calls of either bank
// (two may be open, and waited for in any order), cleans.
constexpr int kNumWarningCells = kNumLowLatencyBanks + 2;
constexpr int warning_cell(Operation operation, uint64_t call) {
    if (operation == Operation::kLowLatencyClean) return kNumLowLatencyBanks + 1;
    return is_low_latency(operation) ? 1 + static_cast<int>(call % kNumLowLatencyBanks) : 0;
}

// Device-local, private to the rank; survives between calls.
struct LocalState {
    uint64_t num_calls;        // completed calls of the high-throughput mode; the same on all ranks
    uint32_t num_done_blocks;  // of the running kernel; see algo::arrive
    uint32_t failure_claimed;
    uint64_t warned_calls[kNumWarningCells];  // the last call of each that a warning tells of; see warning_cell
    uint32_t num_weight_blocks;               // of the running combine: that have copied their part of the weights
    uint32_t layout_done_blocks;
    uint32_t rail_abort_claimed;  // not zero: a kernel has told the rail peers, or does, that this rank gave up

    uint64_t num_low_latency_sends;  // low-latency calls whose send phase has been run
    uint64_t num_low_latency_cleans;
    uint64_t num_low_latency_launches;  // of either phase, or both
    // The last call of each bank whose receive phase has been run. The next launch tells the peers.
    uint64_t low_latency_ended[kNumLowLatencyBanks];
    LowLatencyLaunchState low_latency_launch_states[2];
    uint32_t low_latency_done_blocks;  // counted only for statistics
    uint32_t low_latency_read_blocks;  // of a receive phase that tells the peers of its end itself

    // Set once, by the host.
    WaitCell* wait_cells;  // null: waits are not counted
    uint64_t warn_ns;
};

// Deadlines, and where a failing wait leaves its record.
struct WatchParams {
    LocalState* local;
    HostStatus* status;
    uint64_t timeout_ns;
    uint64_t late_ns;  // from here on a wait is counted, and told of after LocalState::warn_ns
};

// What a record of kRows has seen: the first row, and one beyond the last.
constexpr uint64_t make_row_span(int first, int end) {
    return static_cast<uint64_t>(static_cast<uint32_t>(first)) << 32 | static_cast<uint32_t>(end);
}
constexpr int first_of_span(uint64_t span) { return static_cast<int>(span >> 32); }
constexpr int end_of_span(uint64_t span) { return static_cast<int>(span & 0xffffffffu); }

// Never zero. Which rank gave up, and the peer that it waited for.
constexpr uint64_t make_abort_code(int origin, int missing) {
    return 1ull << 63 | static_cast<uint64_t>(origin) << 32 | static_cast<uint32_t>(missing);
}
// This rank gave up, and its peers go on without it: its kernels end, and tell nobody.
constexpr uint64_t kLonelyAbort = 1ull << 62;
constexpr bool is_lonely_abort(uint64_t code) { return (code & kLonelyAbort) != 0; }
constexpr int abort_origin(uint64_t code) { return static_cast<int>(code >> 32 & 0x3fffffffu); }
constexpr int abort_missing(uint64_t code) { return static_cast<int>(code & 0xffffffffu); }

}  // namespace deep_ep::layout
