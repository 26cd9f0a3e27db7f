// The sentences that records become: every word that is packed in memory is unpacked before it is shown.
#include "runtime/failure_report.h"

#include <doctest/doctest.h>

#include "layout/intranode.h"
#include "layout/low_latency.h"

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
    return describe_failure(record, {{3, 3, 0}, {{1, 3}, {2, 3}}, nothing, nothing});
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
