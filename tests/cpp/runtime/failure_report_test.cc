// The sentences that records become: every word that is packed in memory is unpacked before it is shown.
#include "runtime/failure_report.h"

#include <doctest/doctest.h>

#include "layout/heap.h"

namespace deep_ep::runtime {
namespace {

using layout::FailureKind;
using layout::Operation;
using layout::Stage;

std::string nothing(int) { return ""; }

layout::WaitRecord make_record(Operation operation, Stage stage, uint64_t expected, uint64_t seen) {
    layout::WaitRecord record{};
    record.kind = FailureKind::kTimeout;
    record.operation = operation;
    record.stage = stage;
    record.peer = 1;
    record.call = 3;
    record.expected = expected;
    record.seen = seen;
    return record;
}

// At rank 0 of three, all of which have entered the call.
std::string told(const layout::WaitRecord& record) {
    return describe_failure(record, {{3, 3, 0}, {{1, 3}, {2, 3}}, nothing, nothing, nothing});
}

void check_progress(Operation operation, Stage stage, uint64_t expected, uint64_t seen, const std::string& progress) {
    CAPTURE(static_cast<int>(operation));
    CAPTURE(static_cast<int>(stage));
    const std::string sentence = told(make_record(operation, stage, expected, seen));
    CHECK_MESSAGE(sentence.find("stalled (" + progress + ")") != std::string::npos, sentence);
}

TEST_CASE("flags of rows are a call and a row") {
    for (Operation operation : {Operation::kDispatch, Operation::kCombine})
        for (Stage stage : {Stage::kRow, Stage::kSlot}) {
            check_progress(operation, stage, layout::make_tag(3, 20), layout::make_tag(1, 4),
                           "expected row 20 of call 3, seen row 4 of call 1");
            check_progress(operation, stage, layout::make_tag(3, 0), 0, "expected row 0 of call 3, seen nothing");
        }
}

TEST_CASE("counts are told by their call") {
    for (Operation operation : {Operation::kNotifyDispatch, Operation::kDispatch}) {
        check_progress(operation, Stage::kCounts, layout::make_count(3, 0), layout::make_count(1, 77),
                       "expected call 3, seen call 1");
        check_progress(operation, Stage::kCounts, layout::make_count(3, 0), layout::make_count(1, -1),
                       "expected call 3, seen call 1");
    }
}

TEST_CASE("flags of low-latency rows are a call, whatever entries they name beside it") {
    using Slots = layout::LowLatencyEntrySlots;
    check_progress(Operation::kLowLatencyCombine, Stage::kRow, 3, Slots::rows_flag(1, 0xffff),
                   "expected call 3, seen call 1");
    check_progress(Operation::kLowLatencyDispatch, Stage::kRow, 3, 1, "expected call 3, seen call 1");
}

TEST_CASE("flags that are the number of a call say so") {
    for (Stage stage : {Stage::kStart, Stage::kLoan, Stage::kWeights, Stage::kReturn})
        check_progress(Operation::kCombine, stage, 3, 2, "expected call 3, seen call 2");
    for (Stage stage : {Stage::kStart, Stage::kTable})
        check_progress(Operation::kLowLatencyDispatch, stage, 3, 2, "expected call 3, seen call 2");
    check_progress(Operation::kLowLatencyClean, Stage::kClean, 3, 2, "expected call 3, seen call 2");
}

TEST_CASE("an abort word is a rank that gave up and one that it waited for, and nothing else") {
    layout::WaitRecord record =
        make_record(Operation::kCombine, Stage::kRow, layout::make_tag(3, 20), layout::make_abort_code(2, 1));
    record.kind = FailureKind::kAborted;
    const std::string sentence = told(record);
    CHECK_MESSAGE(sentence.find("aborted, rank 2 gave up waiting for rank 1; here: rank 1 entered the call and stalled "
                                "(expected row 20 of call 3)") != std::string::npos,
                  sentence);
}

TEST_CASE("rows that cannot be are told by where they begin and end") {
    layout::WaitRecord record = make_record(Operation::kCombine, Stage::kRows, 12, layout::make_row_span(-7, -9));
    record.kind = FailureKind::kBadInput;
    record.token = 2;
    CHECK(told(record).find("rows from rank 1 to rank 2 begin at -7 and end at -9.") != std::string::npos);
    record.seen = layout::make_row_span(3, 13);
    CHECK(told(record).find("begin at 3 and end at 13, of 12 in all.") != std::string::npos);
}

// At rank 0 of two nodes of two: rank 1 is its neighbour, rank 2 its rail peer, and rank 3 speaks to it through rank 1.
std::string told_across(const layout::WaitRecord& record, std::vector<Progress> progress,
                        const std::string& told = "") {
    return describe_failure(record, {{4, 2, 0}, std::move(progress), nothing, nothing, [&](int) { return told; }});
}

layout::WaitRecord make_rail_record(Stage stage, int peer, uint64_t expected, uint64_t seen) {
    layout::WaitRecord record = make_record(Operation::kDispatch, stage, expected, seen);
    record.peer = peer;
    return record;
}

void check_says(const std::string& sentence, const std::string& part) {
    CHECK_MESSAGE(sentence.find(part) != std::string::npos, sentence);
}

TEST_CASE("across nodes every rank is named with its node, and who never entered the call") {
    const layout::WaitRecord record = make_rail_record(Stage::kRailCounts, 2, 3, 2);
    const std::string sentence = told_across(record, {{1, 3}, {2, 2}});
    check_says(sentence,
               "dispatch, call 3, rank 0 of node 0: waited 0.0 s for rank 2 of node 1 to send its token counts");
    check_says(sentence, "never entered this call: rank 2 of node 1 (its last call was 2)");
}

TEST_CASE("a rail peer that entered the call and stalled says how far it is") {
    check_says(
        told_across(make_rail_record(Stage::kRailChunk, 2, layout::make_tag(3, 4), layout::make_tag(3, 1)),
                    {{1, 3}, {2, 3}}),
        "to send tokens to this node; rank 2 of node 1 entered the call and stalled (expected chunk 4 of call 3, "
        "seen chunk 1 of call 3)");
    check_says(told_across(make_rail_record(Stage::kRailTaken, 2, layout::make_tag(3, 4), 0), {{1, 3}, {2, 3}}),
               "(expected chunk 4 of call 3, seen nothing)");
    check_says(told_across(make_rail_record(Stage::kRailBank, 2, 1, 0), {{1, 3}, {2, 3}}),
               "(expected call 1, seen nothing)");
}

TEST_CASE("what a combine waits for on the rail are sums") {
    layout::WaitRecord record = make_rail_record(Stage::kRailChunk, 2, layout::make_tag(3, 4), 0);
    record.operation = Operation::kCombine;
    check_says(told_across(record, {{1, 3}, {2, 3}}),
               "for rank 2 of node 1 to send its node's sums of this rank's tokens;");
    record.stage = Stage::kRailTaken;
    check_says(told_across(record, {{1, 3}, {2, 3}}),
               "for rank 2 of node 1 to take out the sums that were sent to it;");
}

TEST_CASE("a rail peer that stalled because of a third rank says whom it waited for") {
    check_says(told_across(make_rail_record(Stage::kRailChunk, 2, layout::make_tag(3, 0), 0), {{1, 3}, {2, 3}},
                           describe_abort_code(layout::make_abort_code(2, 3), {4, 2, 0})),
               "rank 2 of node 1 entered the call and stalled (expected chunk 0 of call 3, seen nothing); it reports: "
               "rank 2 of node 1 gave up waiting for rank 3 of node 1.");
}

TEST_CASE("a rank of another node and another rail is waited for through its forwarder, who says what it saw") {
    const layout::WaitRecord record = make_rail_record(Stage::kRailCounts, 3, layout::make_count(3, 0), 0);
    const std::string sentence = told_across(record, {{1, 3}, {2, 3}}, "rank 3 of node 1 never entered");
    check_says(
        sentence,
        "for rank 3 of node 1 to send its token counts; rank 1 of node 0, its forwarder, entered the call and has "
        "passed nothing on");
    check_says(sentence, "; it reports: rank 3 of node 1 never entered");
    check_says(told_across(record, {{1, 2}, {2, 3}}),
               "never entered this call: rank 1 of node 0 (its last call was 2)");
}

TEST_CASE("an abort from another node names both ranks with their nodes") {
    layout::WaitRecord record = make_rail_record(Stage::kRow, 1, layout::make_tag(3, 0), layout::make_abort_code(3, 1));
    record.kind = FailureKind::kAborted;
    check_says(
        told_across(record, {{1, 2}, {2, 3}}),
        "aborted, rank 3 of node 1 gave up waiting for rank 1 of node 0; here: never entered this call: rank 1 of "
        "node 0 (its last call was 2).");
}

TEST_CASE("bad input on the rail is told by what was found") {
    layout::WaitRecord record = make_rail_record(Stage::kRailShapes, 2, 7, 9);
    record.kind = FailureKind::kBadInput;
    check_says(told_across(record, {}), "rank 2 of node 1 dispatches rows of another shape");
    record.stage = Stage::kRailCapacity;
    check_says(told_across(record, {}),
               "the tensors hold 7 tokens to forward, but 9 come from other nodes. Raise num_worst_tokens");
    record.stage = Stage::kRailRows;
    record.token = 7;
    check_says(told_across(record, {}), "9 tokens between this rank and rank 2 of node 1, where 7 are stated");
}

// Numbers that are not packed, but negative.
TEST_CASE("what a routing table states is a signed number") {
    layout::WaitRecord record =
        make_record(Operation::kLowLatencyDispatch, Stage::kStated, 16, static_cast<uint64_t>(-3));
    record.kind = FailureKind::kBadInput;
    CHECK(told(record).find("states -3 where at most 16 can be") != std::string::npos);
    record.stage = Stage::kInput;
    CHECK(told(record).find("must be -1 or an expert below 16, got -3") != std::string::npos);
}

}  // namespace
}  // namespace deep_ep::runtime
