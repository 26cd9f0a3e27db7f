#include "runtime/failure_report.h"

#include <iomanip>
#include <sstream>

#include "core/error.h"

namespace deep_ep::runtime {

namespace {

std::string seconds(uint64_t ns) {
    std::ostringstream out;
    out << std::fixed << std::setprecision(1) << static_cast<double>(ns) * 1e-9 << " s";
    return out.str();
}

// What a word says that the peer writes, or will. Flags of rows and counts are packed.
std::string meaning_of(const layout::WaitRecord& record, uint64_t word) {
    const bool is_of_row = record.stage == layout::Stage::kRow || record.stage == layout::Stage::kSlot;
    if (word == 0) return "nothing";
    if (record.stage == layout::Stage::kRailChunk || record.stage == layout::Stage::kRailTaken)
        return concat("chunk ", layout::position_of_tag(word), " of call ", layout::call_of_tag(word));
    if (record.stage == layout::Stage::kRailRoom) return concat(word, " commands");
    // A forwarder leaves them as counts, a rail peer as a flag.
    if (record.stage == layout::Stage::kRailCounts && layout::call_of_count(word) != 0)
        return concat("call ", layout::call_of_count(word));
    if (record.stage == layout::Stage::kCapacity) return concat(word, " rows");
    if (record.stage == layout::Stage::kCounts) return concat("call ", layout::call_of_count(word));
    if (!is_of_row) return concat("call ", word);
    if (layout::is_low_latency(record.operation)) return concat("call ", layout::LowLatencyEntrySlots::call_of(word));
    return concat("row ", layout::position_of_tag(word), " of call ", layout::call_of_tag(word));
}

// An aborted wait has seen the abort word.
std::string progress_of(const layout::WaitRecord& record) {
    const std::string expected = concat("expected ", meaning_of(record, record.expected));
    if (record.kind == layout::FailureKind::kAborted) return expected;
    return concat(expected, ", seen ", meaning_of(record, record.seen));
}

// With its node, where there are several.
std::string name_of(int rank, const layout::Topology& topology) {
    if (topology.num_nodes() == 1) return concat("rank ", rank);
    return concat("rank ", rank, " of node ", topology.node_of(rank));
}

std::string where(const layout::WaitRecord& record, const layout::Topology& topology) {
    return concat("DeepEP error: ", operation_name(record.operation), ", call ", record.call, ", ",
                  name_of(topology.rank, topology));
}

// Ranks in other nodes and on other rails speak to this one through their forwarder in its node; -1: `peer` needs none.
int forwarder_of(layout::Operation operation, int peer, const layout::Topology& topology) {
    const bool is_direct =
        layout::is_low_latency(operation) || topology.is_neighbour(peer) || topology.index_of(peer) == topology.index();
    return is_direct ? -1 : topology.forwarder(peer, topology.node());
}

std::string remark_on(int peer, const Peers& peers) {
    const std::string text = peers.remark(peer);
    return text.empty() ? "" : "; " + text;
}

std::string stalled(const layout::WaitRecord& record, const Peers& peers) {
    const int forwarder = forwarder_of(record.operation, record.peer, peers.topology);
    const int peer = forwarder < 0 ? record.peer : forwarder;
    const std::string told = record.kind == layout::FailureKind::kTimeout ? peers.stall(peer) : "";
    return concat(name_of(peer, peers.topology), forwarder < 0 ? "" : ", its forwarder,", " entered the call and ",
                  forwarder < 0 ? "stalled (" : "has passed nothing on (", progress_of(record), remark_on(peer, peers),
                  ")", told.empty() ? "" : "; it reports: ", told);
}

// A peer that waits for a third rank stalls as well: those that never entered the call are the ones to look at.
std::string culprits(const layout::WaitRecord& record, const Peers& peers) {
    std::string missing;
    for (const auto& [peer, call] : peers.progress) {
        if (call >= record.call) continue;
        missing += concat(missing.empty() ? "" : ", ", name_of(peer, peers.topology), " (its last call was ", call,
                          remark_on(peer, peers), ")");
    }
    return missing.empty() ? stalled(record, peers) : concat("never entered this call: ", missing);
}

std::string describe_wait(const layout::WaitRecord& record, const Peers& peers) {
    const layout::Topology& topology = peers.topology;
    return concat(operation_name(record.operation), ", call ", record.call, ", ", name_of(topology.rank, topology),
                  ": waited ", seconds(record.waited_ns), " for ", name_of(record.peer, topology), " ",
                  stage_name(record.stage, record.operation).awaited, "; ", culprits(record, peers), ".");
}

std::string describe_rows(const layout::WaitRecord& record, const layout::Topology& topology) {
    const int first = layout::first_of_span(record.seen), end = layout::end_of_span(record.seen);
    const bool goes_beyond = first >= 0 && end >= first;
    return concat(
        where(record, topology), ": rows from rank ", record.peer, " to rank ", record.token, " begin at ", first,
        " and end at ", end, goes_beyond ? concat(", of ", record.expected, " in all") : "",
        ". num_tokens_per_rank must not be negative; the tensors of a handle (rank_prefix_matrix) must belong "
        "together, and stay as they are.");
}

std::string describe_bad_input(const layout::WaitRecord& record, const layout::Topology& topology) {
    if (record.stage == layout::Stage::kCapacity)
        return concat(where(record, topology), ": the tensors hold ", record.expected, " rows, but ", record.seen,
                      " rows belong to this rank. Raise num_worst_tokens, or pass the tensors that fit the handle.");
    if (record.stage == layout::Stage::kPosition)
        return concat(where(record, topology), ": token ", record.token, " is row ", record.seen, " of those for rank ",
                      record.peer, ", but ", record.expected,
                      " are stated. num_tokens_per_rank must count the tokens of is_token_in_rank; the tensors of a "
                      "handle must belong together.");
    if (record.stage == layout::Stage::kRows) return describe_rows(record, topology);
    if (record.stage == layout::Stage::kRailShapes)
        return concat(where(record, topology), ": ", name_of(record.peer, topology),
                      " dispatches rows of another shape, or another number of experts. Shapes and formats must be the "
                      "same on every rank; DEEP_EP_CHECK_CALLS=1 compares them.");
    if (record.stage == layout::Stage::kRailCapacity)
        return concat(where(record, topology), ": the tensors hold ", record.expected, " tokens to forward, but ",
                      record.seen,
                      " come from other nodes. Raise num_worst_tokens, or pass the tensors that fit the handle.");
    if (record.stage == layout::Stage::kRailRows)
        return concat(where(record, topology), ": ", static_cast<int32_t>(record.seen),
                      " tokens between this rank and ", name_of(record.peer, topology), ", where ", record.token,
                      " are stated. num_tokens_per_rdma_rank must count the tokens of is_token_in_rank by node; the "
                      "tensors of a handle must belong together, and stay as they are.");
    if (record.stage == layout::Stage::kStated)
        return concat(
            where(record, topology), ": the routing table of rank ", record.peer, " states ",
            static_cast<int64_t>(record.seen), " where at most ", static_cast<int64_t>(record.expected),
            " can be. Shapes and formats must be the same on every rank; DEEP_EP_CHECK_CALLS=1 compares them.");
    if (record.stage == layout::Stage::kEntry)
        return concat(where(record, topology), ": topk_idx of token ", record.expected, " of rank ", record.peer,
                      " names an expert for which the dispatch of the handle has no row. combine needs the "
                      "topk_idx of the dispatch (an entry may become -1) and the handle that this dispatch returned.");
    if (record.stage == layout::Stage::kOpen)
        return concat(
            where(record, topology), ": call ", record.expected,
            " is still open, and this one needs its memory. Call its hook before a graph that is replayed makes "
            "the second call after it.");
    return concat("DeepEP error: ", operation_name(record.operation), ", ", name_of(topology.rank, topology),
                  ": topk_idx of token ", record.peer, " must be -1 or an expert below ", record.expected, ", got ",
                  static_cast<int64_t>(record.seen), ".");
}

std::string who_gave_up(uint64_t code, const Peers& peers) {
    const std::string text = describe_abort_code(code, peers.topology);
    const int origin = layout::abort_origin(code);
    const std::string reason = origin == layout::abort_missing(code) ? peers.reason(origin) : "";
    return reason.empty() ? text : text + ": " + reason;
}

std::string describe_abort(const layout::WaitRecord& record, const Peers& peers) {
    const bool is_told = layout::abort_origin(record.seen) == layout::abort_missing(record.seen);
    const std::string text = concat(where(record, peers.topology), ": aborted, ", who_gave_up(record.seen, peers));
    if (is_told) return text.ends_with('.') ? text : text + ".";
    // A rank that was told before its first wait has nobody to name.
    const std::string here = record.peer == peers.topology.rank ? "" : concat("; here: ", culprits(record, peers));
    return concat(text, here, ".");
}

}  // namespace

const char* operation_name(layout::Operation operation) {
    switch (operation) {
        case layout::Operation::kLayout: return "get_dispatch_layout";
        case layout::Operation::kNotifyDispatch: return "dispatch (count exchange)";
        case layout::Operation::kDispatch: return "dispatch";
        case layout::Operation::kCombine: return "combine";
        case layout::Operation::kLowLatencyDispatch: return "low_latency_dispatch";
        case layout::Operation::kLowLatencyCombine: return "low_latency_combine";
        case layout::Operation::kLowLatencyClean: return "clean_low_latency_buffer";
    }
    return "unknown operation";
}

// Over the rail go tokens, and on the way back their sums.
StageName stage_name(layout::Stage stage, layout::Operation operation) {
    const bool is_way_back = operation == layout::Operation::kCombine;
    switch (stage) {
        case layout::Stage::kStart: return {"start", "to finish an earlier call"};
        case layout::Stage::kCounts: return {"counts", "to send its token counts"};
        case layout::Stage::kTable: return {"table", "to send its routing table"};
        case layout::Stage::kRow: return {"row", "to send token rows"};
        case layout::Stage::kSlot: return {"slot", "to free buffer slots"};
        case layout::Stage::kLoan: return {"loan", "to enter the call"};
        case layout::Stage::kWeights: return {"weights", "to copy its top-k weights"};
        case layout::Stage::kReturn: return {"return", "to finish its part"};
        case layout::Stage::kCapacity: return {"capacity", "to refuse a call for which a peer has no room"};
        case layout::Stage::kClean: return {"clean", "to call it too"};
        case layout::Stage::kRailBank: return {"rail_bank", "to finish an earlier call"};
        case layout::Stage::kRailCounts: return {"rail_counts", "to send its token counts"};
        case layout::Stage::kRailChunk:
            return {"rail_chunk",
                    is_way_back ? "to send its node's sums of this rank's tokens" : "to send tokens to this node"};
        case layout::Stage::kRailTaken:
            return {"rail_taken", is_way_back ? "to take out the sums that were sent to it"
                                              : "to take out tokens that were sent to its node"};
        case layout::Stage::kRailRoom: return {"rail_room", "to take what is posted for it"};
        case layout::Stage::kRailShapes:
        case layout::Stage::kRailCapacity:
        case layout::Stage::kRailRows:
        case layout::Stage::kEntry:
        case layout::Stage::kStated:
        case layout::Stage::kOpen:
        case layout::Stage::kInput:
        case layout::Stage::kPosition:
        case layout::Stage::kRows: return {"", "(input)"};
    }
    return {"", "(unknown stage)"};
}

std::string describe_abort_code(uint64_t code, const layout::Topology& topology) {
    const int origin = layout::abort_origin(code), missing = layout::abort_missing(code);
    const std::string name = name_of(origin, topology);
    if (origin == missing) return name + " reported an error of its own";
    return concat(name, " gave up waiting for ", name_of(missing, topology));
}

std::string describe_failure(const layout::WaitRecord& record, const Peers& peers) {
    switch (record.kind) {
        case layout::FailureKind::kBadInput: return describe_bad_input(record, peers.topology);
        case layout::FailureKind::kAborted: return describe_abort(record, peers);
        default:
            return concat(
                "DeepEP timeout: ", describe_wait(record, peers),
                " Every rank must make the same sequence of dispatch and combine calls; if a peer may be this "
                "late, raise DEEP_EP_TIMEOUT_SECS or the Buffer's timeout.");
    }
}

std::string describe_note(const layout::Topology& topology, int origin, const std::string& reason) {
    return concat("DeepEP error: ", name_of(topology.rank, topology), ": aborted, because ", name_of(origin, topology),
                  " failed: ", reason);
}

std::string describe_rail_abort(uint64_t code, const Peers& peers) {
    const layout::Topology& topology = peers.topology;
    std::string remarks;
    for (int index = 0; index < topology.ranks_per_node; ++index) {
        const int peer = topology.neighbour(index);
        if (peer == topology.rank) continue;
        const std::string remark = peers.remark(peer);
        if (!remark.empty()) remarks += concat("; ", name_of(peer, topology), ": ", remark);
    }
    return concat("DeepEP error: ", name_of(topology.rank, topology), ": aborted, ", who_gave_up(code, peers), remarks,
                  ".");
}

std::string describe_transport(const layout::Topology& topology, const std::string& text) {
    return concat("DeepEP error: ", name_of(topology.rank, topology), ": ", text);
}

std::string describe_warning(const layout::WaitRecord& record, const Peers& peers) {
    return concat("DeepEP warning: ", describe_wait(record, peers), " Still waiting.");
}

}  // namespace deep_ep::runtime
