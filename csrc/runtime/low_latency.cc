#include "runtime/low_latency.h"

#include <algorithm>
#include <iterator>

#include "core/error.h"

namespace deep_ep::runtime {

namespace {

// A size hint is not told the top-k: it allows for so many entries of a token.
constexpr int kHintTopk = 32;

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

layout::LowLatencyMessage make_message(const LowLatencyArgs& shape, int num_ranks, uint64_t row_bytes,
                                       uint64_t num_scales) {
    return layout::LowLatencyMessage::make(static_cast<uint64_t>(shape.num_max_tokens),
                                           static_cast<uint64_t>(shape.num_topk),
                                           static_cast<uint64_t>(shape.num_experts / num_ranks), row_bytes, num_scales);
}

layout::LowLatencyMessage dispatch_message(const LowLatencyArgs& shape, int num_ranks, bool is_fp8) {
    const auto hidden = static_cast<uint64_t>(shape.hidden);
    return make_message(shape, num_ranks, is_fp8 ? hidden : 2 * hidden, is_fp8 ? hidden / layout::kFp8GroupSize : 0);
}

layout::LowLatencyMessage combine_message(const LowLatencyArgs& shape, int num_ranks, bool uses_logfmt) {
    if (!uses_logfmt) return dispatch_message(shape, num_ranks, false);
    return make_message(shape, num_ranks, layout::LogfmtRow::make(static_cast<uint64_t>(shape.hidden)).bytes, 0);
}

}  // namespace

int64_t LowLatency::size_hint(int num_max_tokens, int hidden, int num_ranks, int num_experts) {
    LowLatencyArgs shape{};
    shape.num_max_tokens = num_max_tokens;
    shape.num_topk = kHintTopk;
    shape.num_experts = num_experts;
    shape.hidden = hidden;
    check_shape(shape, 0, num_ranks);
    const auto message = dispatch_message(shape, num_ranks, false);
    using Slots = layout::LowLatencyEntrySlots;
    const uint64_t entry_bytes =
        Slots::bytes(static_cast<uint64_t>(num_max_tokens), Slots::kHintTopk, static_cast<uint64_t>(hidden));
    return static_cast<int64_t>(
        std::max(message.region_bytes(static_cast<uint64_t>(num_ranks)), layout::kNumLowLatencyBanks * entry_bytes));
}

LowLatency::LowLatency(Connection& connection, const kernels::KernelTable& kernels)
    : connection_(connection),
      kernels_(kernels),
      num_ranks_(connection.options().num_ranks),
      masked_(connection.device(), static_cast<size_t>(num_ranks_)),
      wait_ns_(connection.device(), 2 * static_cast<size_t>(num_ranks_)) {}

void LowLatency::release() noexcept {
    masked_.reset();
    wait_ns_.reset();
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
    const auto needed = static_cast<int64_t>(message.region_bytes(static_cast<uint64_t>(num_ranks_)));
    EP_CHECK(needed <= connection_.options().num_low_latency_bytes,
             "num_rdma_bytes is too small for this call: expected at least ", needed, ", got ",
             connection_.options().num_low_latency_bytes, " (see Buffer.get_low_latency_rdma_size_hint)");
    const LowLatencyGrid grid =
        plan_low_latency(connection_.machine(), connection_.heap().num_ranks_here(), args.hidden);
    const auto num_ranks = static_cast<uint64_t>(num_ranks_);
    return {{.heap = connection_.heap_params(),
             .watch = connection_.watch_params(),
             .message = message,
             .uses_packets = false,
             .entry_slot_bytes = 0,
             .data_offset = connection_.plan().low_latency_offset,
             .region = layout::LowLatencyRegion::make(connection_.plan().num_low_latency_bytes, num_ranks),
             .phase = kernels::Phase::kSend,
             .num_blocks = grid.num_blocks,
             .num_warps = grid.num_warps,
             .masked = masked_.get(),
             .is_shrinkable = connection_.options().is_shrinkable,
             .decisions = wait_ns_.get() + num_ranks_,
             .wait_ns = wait_ns_.get(),
             .num_local_experts = args.num_experts / num_ranks_},
            args};
}

kernels::LowLatencyDispatchParams LowLatency::make_params(const LowLatencyDispatchArgs& args) const {
    check_shape(args, args.num_tokens, num_ranks_);
    EP_CHECK(!args.is_fp8 || args.hidden % layout::kFp8GroupSize == 0, "hidden must be a multiple of ",
             layout::kFp8GroupSize, " with use_fp8, got ", args.hidden);
    EP_CHECK(!args.packs_scales || (args.rounds_scales && args.hidden % (4 * layout::kFp8GroupSize) == 0),
             "use_ue8m0 needs round_scale, and hidden must be a multiple of ", 4 * layout::kFp8GroupSize, ", got ",
             args.hidden);
    return {{.call = make_call(args, dispatch_message(args, num_ranks_, args.is_fp8)),
             .payload = args.is_fp8 ? kernels::Payload::kFp8 : kernels::Payload::kBf16,
             .num_set_words = plan_set_words(args, args.num_tokens)},
            args};
}

kernels::LowLatencyCombineParams LowLatency::make_params(const LowLatencyCombineArgs& args) const {
    check_shape(args, args.num_tokens, num_ranks_);
    auto call = make_call(args, combine_message(args, num_ranks_, args.uses_logfmt));
    using Slots = layout::LowLatencyEntrySlots;
    const auto hidden = static_cast<uint64_t>(args.hidden);
    const uint64_t entry_bytes =
        Slots::bytes(static_cast<uint64_t>(args.num_max_tokens), static_cast<uint64_t>(args.num_topk), hidden);
    call.entry_slot_bytes = Slots::slot_bytes(hidden);
    // Where a source may be left out its weights count as a whole or not at all, which is what one flag says.
    call.uses_packets = !connection_.options().is_shrinkable && args.num_topk <= Slots::kMaxTopk &&
                        2 * args.num_max_tokens * args.num_topk <= layout::kMaxLowLatencyPackets &&
                        entry_bytes <= call.region.bank_bytes;
    return {{call}, args};
}

// Its words and its region are those of one node.
void LowLatency::require_one_node() const {
    EP_ENSURE(connection_.topology().num_nodes() == 1, "a low-latency call of a Buffer whose group spans nodes");
}

void LowLatency::clean(dev::Stream stream) {
    require_one_node();
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
    connection_.announce(stream, true);
    kernels_.low_latency_clean(call, stream);
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
uint64_t LowLatency::run(const Args& args, void (*launch)(const Params&, dev::Stream), uint64_t ticket,
                         dev::Stream stream) {
    require_one_node();
    const bool is_hook = ticket != kSendPhase && ticket != kBothPhases;  // which is a call of its own
    if (is_hook)
        connection_.begin_call();
    else
        connection_.check();
    Params params = make_params(args);
    const uint64_t entered = enter(params.call, ticket);
    connection_.announce(stream, true);
    launch(params, stream);
    return entered;
}

uint64_t LowLatency::dispatch(const LowLatencyDispatchArgs& args, uint64_t ticket, dev::Stream stream) {
    return run(args, kernels_.low_latency_dispatch, ticket, stream);
}

uint64_t LowLatency::combine(const LowLatencyCombineArgs& args, uint64_t ticket, dev::Stream stream) {
    return run(args, kernels_.low_latency_combine, ticket, stream);
}

}  // namespace deep_ep::runtime
