#include "runtime/low_latency.h"

#include <algorithm>
#include <iterator>

#include "core/error.h"
#include "runtime/plan.h"

namespace deep_ep::runtime {

namespace {

// A size hint is not told the top-k: it allows for so many entries of a token.
constexpr int kHintTopk = 32;
// Warps that share a token in a receive phase, at most.
constexpr int kMostDispatchParts = 16, kMostCombineParts = 32;
constexpr int kVectorBytes = 16;

int ceil_div(int count, int parts) { return (count + parts - 1) / parts; }

void check_shape(const LowLatencyArgs& shape, int num_tokens, int num_ranks) {
    EP_CHECK(shape.num_max_tokens > 0 && shape.num_max_tokens <= layout::kMaxLowLatencyTokens,
             "num_max_dispatch_tokens_per_rank must be in [1, ", layout::kMaxLowLatencyTokens, "], got ",
             shape.num_max_tokens);
    EP_CHECK(num_tokens >= 0 && num_tokens <= shape.num_max_tokens,
             "x must have at most num_max_dispatch_tokens_per_rank (", shape.num_max_tokens, ") tokens, got ",
             num_tokens);
    check_num_experts(shape.num_experts, num_ranks);
    EP_CHECK(shape.num_experts <= kernels::kMaxLowLatencyExperts, "num_experts must be at most ",
             kernels::kMaxLowLatencyExperts, ", got ", shape.num_experts);
    EP_CHECK(shape.hidden > 0 && shape.hidden % 8 == 0, "hidden must be a positive multiple of 8, got ", shape.hidden);
}

// `num_counts`: of experts that its table states. Of a dispatch, those of the receiver, or of all where the group spans nodes.
layout::LowLatencyMessage make_message(const LowLatencyArgs& shape, int num_counts, uint64_t row_bytes,
                                       uint64_t num_scales) {
    return layout::LowLatencyMessage::make(static_cast<uint64_t>(shape.num_max_tokens),
                                           static_cast<uint64_t>(shape.num_topk), static_cast<uint64_t>(num_counts),
                                           row_bytes, num_scales);
}

layout::LowLatencyMessage dispatch_message(const LowLatencyArgs& shape, int num_counts, bool is_fp8) {
    const auto hidden = static_cast<uint64_t>(shape.hidden);
    return make_message(shape, num_counts, is_fp8 ? hidden : 2 * hidden, is_fp8 ? hidden / layout::kFp8GroupSize : 0);
}

layout::LowLatencyMessage combine_message(const LowLatencyArgs& shape, int num_counts, bool uses_logfmt) {
    if (!uses_logfmt) return dispatch_message(shape, num_counts, false);
    return make_message(shape, num_counts, layout::LogfmtRow::make(static_cast<uint64_t>(shape.hidden)).bytes, 0);
}

}  // namespace

int64_t LowLatency::size_hint(int num_max_tokens, int hidden, int num_ranks, int num_experts) {
    LowLatencyArgs shape{};
    shape.num_max_tokens = num_max_tokens;
    shape.num_topk = kHintTopk;
    shape.num_experts = num_experts;
    shape.hidden = hidden;
    check_shape(shape, 0, num_ranks);
    const auto message = dispatch_message(shape, num_experts, false);
    using Slots = layout::LowLatencyEntrySlots;
    const uint64_t table_bytes =
        make_message({num_max_tokens, Slots::kHintTopk, 0, 0, nullptr, nullptr}, 0, 16, 0).slots.offset;
    const uint64_t entry_bytes =
        Slots::bytes(static_cast<uint64_t>(num_max_tokens), Slots::kHintTopk, static_cast<uint64_t>(hidden)) +
        static_cast<uint64_t>(num_ranks) * table_bytes;
    // It is not told of nodes either: what they cost beside is little.
    const uint64_t rounding = layout::LowLatencyShares::rounding_bytes(static_cast<uint64_t>(num_ranks));
    return static_cast<int64_t>(std::max(message.region_bytes(static_cast<uint64_t>(num_ranks)),
                                         layout::kNumLowLatencyBanks * entry_bytes + rounding));
}

LowLatency::LowLatency(Connection& connection, const kernels::KernelTable& kernels)
    : connection_(connection),
      kernels_(kernels),
      num_ranks_(connection.options().num_ranks),
      masked_(connection.device(), static_cast<size_t>(num_ranks_)),
      wait_ns_(connection.device(), 2 * static_cast<size_t>(num_ranks_)) {
    if (connection.rail_region().has_low_latency())
        told_ = {connection.device(), kernels::LowLatencyRail::kNumTold * static_cast<size_t>(num_ranks_)};
}

void LowLatency::release() noexcept {
    masked_.reset();
    wait_ns_.reset();
    told_.reset();
}

uint8_t* LowLatency::data() const {
    connection_.require_usable();
    return connection_.local(connection_.plan().low_latency_offset);
}

int* LowLatency::masked_ranks() const {
    connection_.require_usable();
    return masked_.get();
}

kernels::LowLatencyCall LowLatency::make_call(const LowLatencyArgs& args,
                                              const layout::LowLatencyMessage& message) const {
    const auto num_near = static_cast<uint64_t>(connection_.topology().ranks_per_node);
    EP_CHECK(!connection_.options().is_shrinkable || num_ranks_ <= layout::kMaxRanks,
             "enable_shrink needs a group of at most ", layout::kMaxRanks, " ranks, got ", num_ranks_);
    // Of the tokens of all ranks, as kernels::Divisor divides them by the number of ranks.
    const int64_t most_tokens = (int64_t{1} << 31) / (int64_t{num_ranks_} * num_ranks_);
    EP_CHECK(args.num_max_tokens <= most_tokens, "num_max_dispatch_tokens_per_rank must be at most ", most_tokens,
             " in a group of ", num_ranks_, " ranks, got ", args.num_max_tokens);
    EP_CHECK(fits(message), "num_rdma_bytes is too small for this call: expected at least ", needed_bytes(message),
             ", got ", connection_.options().num_low_latency_bytes, " (see Buffer.get_low_latency_rdma_size_hint)");
    const LowLatencyGrid grid =
        plan_low_latency(connection_.machine(), connection_.heap().num_ranks_here(), args.hidden);
    return {{.heap = connection_.heap_params(),
             .watch = connection_.watch_params(),
             .message = message,
             .uses_packets = false,
             .entry_slot_bytes = 0,
             .data_offset = connection_.plan().low_latency_offset,
             .region = layout::LowLatencyRegion::make(connection_.plan().num_low_latency_bytes, num_near),
             .phase = kernels::Phase::kSend,
             .num_blocks = grid.num_blocks,
             .num_warps = grid.num_warps,
             .masked = masked_.get(),
             .is_shrinkable = connection_.options().is_shrinkable,
             .decisions = wait_ns_.get() + num_ranks_,
             .wait_ns = wait_ns_.get(),
             .num_local_experts = args.num_experts / num_ranks_,
             .by_ranks = kernels::Divisor::make(num_ranks_),
             .by_other_ranks = kernels::Divisor::make(std::max(1, num_ranks_ - 1)),
             .by_local_experts = kernels::Divisor::make(args.num_experts / num_ranks_),
             .by_topk = kernels::Divisor::make(args.num_topk),
             .by_parts = kernels::Divisor::make(1),
             .rail = make_rail()},
            args};
}

kernels::LowLatencyRail LowLatency::make_rail() const {
    const RailRegion& region = connection_.rail_region();
    if (!region.has_low_latency()) return {};
    return {.params = connection_.engine().params(),
            .topology = connection_.topology(),
            .abort = region.control.abort,
            .control = region.low_latency_control,
            .region = region.low_latency,
            .node_windows = nullptr,  // a combine sends sums, or rows, of one rank to one rank
            .told = told_.get()};
}

// Across nodes with what rounding to shares may cost.
int64_t LowLatency::needed_bytes(const layout::LowLatencyMessage& message) const {
    using Shares = layout::LowLatencyShares;
    const auto num_ranks = static_cast<uint64_t>(num_ranks_);
    const uint64_t rounding = spans_nodes() ? Shares::rounding_bytes(num_ranks) : 0;
    return static_cast<int64_t>(message.region_bytes(num_ranks) + rounding);
}

bool LowLatency::fits(const layout::LowLatencyMessage& message) const {
    if (!spans_nodes()) return needed_bytes(message) <= connection_.options().num_low_latency_bytes;
    const layout::LowLatencyRailRegion& rail = connection_.rail_region().low_latency;
    const auto num_near = static_cast<uint64_t>(connection_.topology().ranks_per_node), num_far = num_far_ranks();
    return message.region_bytes(num_near) <= connection_.plan().num_low_latency_bytes &&
           num_far * message.bytes <= rail.receive_bytes &&
           message.slots.offset + num_far * message.slots.bytes() <= rail.staging_bytes;
}

uint64_t LowLatency::num_far_ranks() const {
    return static_cast<uint64_t>(num_ranks_ - connection_.topology().ranks_per_node);
}

// Combine in packets needs a slot for each entry of a bank; across nodes two times, and staging for a row of each token.
bool LowLatency::fits_entry_slots(const kernels::LowLatencyCall& call) const {
    using Slots = layout::LowLatencyEntrySlots;
    const uint64_t bytes = Slots::bytes(static_cast<uint64_t>(call.num_max_tokens),
                                        static_cast<uint64_t>(call.num_topk), static_cast<uint64_t>(call.hidden));
    if (bytes > call.region.bank_bytes) return false;
    const RailRegion& rail = connection_.rail_region();
    if (!rail.has_low_latency()) return true;
    const uint64_t num_far = num_far_ranks();
    const uint64_t num_staged = num_far * static_cast<uint64_t>(call.num_max_tokens);
    return num_far * call.message.slots.offset + bytes <= rail.low_latency.receive_bytes &&
           call.message.slots.offset + num_staged * call.entry_slot_bytes <= rail.low_latency.staging_bytes;
}

kernels::LowLatencyDispatchParams LowLatency::make_params(const LowLatencyDispatchArgs& args) const {
    check_shape(args, args.num_tokens, num_ranks_);
    EP_CHECK(!args.is_fp8 || args.hidden % layout::kFp8GroupSize == 0, "hidden must be a multiple of ",
             layout::kFp8GroupSize, " with use_fp8, got ", args.hidden);
    EP_CHECK(!args.packs_scales || (args.rounds_scales && args.hidden % (4 * layout::kFp8GroupSize) == 0),
             "use_ue8m0 needs round_scale, and hidden must be a multiple of ", 4 * layout::kFp8GroupSize, ", got ",
             args.hidden);
    auto call = make_call(
        args, dispatch_message(args, spans_nodes() ? args.num_experts : args.num_experts / num_ranks_, args.is_fp8));
    call.rail.node_windows = connection_.node_windows();
    const int num_parts = plan_parts(call, num_ranks_ * args.num_max_tokens, kMostDispatchParts);
    call.by_parts = kernels::Divisor::make(num_parts);
    const int num_scales = args.is_fp8 ? args.hidden / layout::kFp8GroupSize / (args.packs_scales ? 4 : 1) : 0;
    const int row_bytes = args.hidden * (args.is_fp8 ? 1 : 2);
    return {{.call = call,
             .payload = args.is_fp8 ? kernels::Payload::kFp8 : kernels::Payload::kBf16,
             .num_set_words = plan_set_words(args, args.num_tokens),
             .num_scale_words = num_scales,
             .part_vecs = ceil_div(row_bytes / kVectorBytes, num_parts),
             .part_scale_words = ceil_div(num_scales, num_parts)},
            args};
}

kernels::LowLatencyCombineParams LowLatency::make_params(const LowLatencyCombineArgs& args) const {
    check_shape(args, args.num_tokens, num_ranks_);
    auto call =
        make_call(args, combine_message(args, spans_nodes() ? 0 : args.num_experts / num_ranks_, args.uses_logfmt));
    using Slots = layout::LowLatencyEntrySlots;
    call.entry_slot_bytes = Slots::slot_bytes(static_cast<uint64_t>(args.hidden));
    // Where a source may be left out its weights count as a whole or not at all, which is what one flag says.
    call.uses_packets = !connection_.options().is_shrinkable && args.num_topk <= Slots::kMaxTopk &&
                        2 * args.num_max_tokens * args.num_topk <= layout::kMaxLowLatencyPackets &&
                        fits_entry_slots(call);
    const int num_chunks = ceil_div(args.hidden, kLowLatencyChunk);
    const int num_parts = plan_parts(call, args.num_tokens, std::min(num_chunks, kMostCombineParts));
    call.by_parts = kernels::Divisor::make(num_parts);
    return {{.call = call, .part_chunks = ceil_div(num_chunks, num_parts)}, args};
}

// A Buffer of one node has its control words at least; across nodes there is no region where nothing was asked for.
void LowLatency::require_rail() const {
    EP_CHECK(!spans_nodes() || connection_.rail_region().has_low_latency(),
             "num_rdma_bytes is too small for low-latency calls of a group that spans nodes, got ",
             connection_.options().num_low_latency_bytes, " (see Buffer.get_low_latency_rdma_size_hint)");
}

void LowLatency::clean(dev::Stream stream) {
    require_rail();
    connection_.check();
    const auto num_open =
        std::count_if(std::begin(open_calls_), std::end(open_calls_), [](uint64_t ticket) { return ticket != 0; });
    if (num_open > 0)
        throw Error(concat("clean_low_latency_buffer: no low-latency call may be open, and ", num_open,
                           num_open == 1 ? " is" : " are", ": call the hook first"));
    kernels::LowLatencyCall call{};
    call.heap = connection_.heap_params();
    call.watch = connection_.watch_params();
    call.masked = masked_.get();
    call.is_shrinkable = connection_.options().is_shrinkable;
    call.rail = make_rail();
    connection_.announce(stream, true);
    connection_.launch(spans_nodes() ? kernels_.internode_low_latency_clean : kernels_.low_latency_clean, call, stream);
}

uint64_t LowLatency::enter(kernels::LowLatencyCall& call, uint64_t ticket) {
    if (ticket == kSendPhase) {
        call.phase = kernels::Phase::kSend;
        return open();
    }
    if (ticket == kBothPhases) {
        call.phase = kernels::Phase::kBoth;
        close(open());
    } else {
        call.phase = kernels::Phase::kReceive;
        close(ticket);
    }
    return ticket;
}

uint64_t LowLatency::open() {
    // The new call waits until the bank has been read, so a call that still holds it could never be received.
    uint64_t& holder = open_calls_[(num_sends_ + 1) % layout::kNumLowLatencyBanks];
    if (holder != 0)
        throw Error(concat("at most ", layout::kNumLowLatencyBanks,
                           " low-latency calls may be open at a time: call the "
                           "hook of the call before the last one first"));
    return holder = ++num_sends_;
}

void LowLatency::close(uint64_t ticket) {
    uint64_t& holder = open_calls_[ticket % layout::kNumLowLatencyBanks];
    EP_ENSURE(holder == ticket, "this hook belongs to a call that is over");
    holder = 0;
}

void LowLatency::abandon_hook(uint64_t ticket, const std::string& text) {
    if (!connection_.is_open() || open_calls_[ticket % layout::kNumLowLatencyBanks] != ticket) return;
    connection_.fail_unfinished(text, true);
}

template <class Args, class Params>
uint64_t LowLatency::run(const Args& args, void (*entry)(const Params&, dev::Stream), uint64_t ticket,
                         dev::Stream stream) {
    require_rail();
    const bool is_hook = ticket != kSendPhase && ticket != kBothPhases;  // which is a call of its own
    if (is_hook)
        connection_.begin_call();
    else
        connection_.check();
    Params params = make_params(args);
    const uint64_t entered = enter(params.call, ticket);
    connection_.announce(stream, true);
    connection_.launch(entry, params, stream);
    return entered;
}

uint64_t LowLatency::dispatch(const LowLatencyDispatchArgs& args, uint64_t ticket, dev::Stream stream) {
    return run(args, spans_nodes() ? kernels_.internode_low_latency_dispatch : kernels_.low_latency_dispatch, ticket,
               stream);
}

uint64_t LowLatency::combine(const LowLatencyCombineArgs& args, uint64_t ticket, dev::Stream stream) {
    return run(args, spans_nodes() ? kernels_.internode_low_latency_combine : kernels_.low_latency_combine, ticket,
               stream);
}

}  // namespace deep_ep::runtime
