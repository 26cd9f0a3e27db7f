// The low-latency half of Buffer.
#include <algorithm>
#include <iterator>

#include "core/error.h"
#include "runtime/buffer.h"

namespace deep_ep::runtime {

namespace {

constexpr int kChunk = 512;  // channels that a warp sends at once
constexpr int kMinWarps = 4;
constexpr int kSetBytes = 32 * 1024;  // of shared memory, for a tile of the routing table
// A size hint is not told the top-k: it allows for so many entries of a token.
constexpr int kHintTopk = 32;

void check_shape(const LowLatencyShape& shape, int num_tokens, int num_ranks) {
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

// For each expert a bit for every token, where that is not too much: else the table is made tile by tile.
int set_words(const LowLatencyShape& shape, int num_tokens) {
    const int fitting = kSetBytes / static_cast<int>(sizeof(uint32_t)) / (shape.num_experts + 32 * shape.num_topk);
    return std::clamp(std::min((num_tokens + 31) / 32, fitting), 1, layout::kMaxLowLatencyTokens / 32);
}

layout::LowLatencyMessage make_message(const LowLatencyShape& shape, int num_ranks, uint64_t row_bytes,
                                       uint64_t num_scales) {
    return layout::LowLatencyMessage::make(static_cast<uint64_t>(shape.num_max_tokens),
                                           static_cast<uint64_t>(shape.num_topk),
                                           static_cast<uint64_t>(shape.num_experts / num_ranks), row_bytes, num_scales);
}

layout::LowLatencyMessage dispatch_message(const LowLatencyShape& shape, int num_ranks, bool is_fp8) {
    const auto hidden = static_cast<uint64_t>(shape.hidden);
    return make_message(shape, num_ranks, is_fp8 ? hidden : 2 * hidden, is_fp8 ? hidden / layout::kFp8GroupSize : 0);
}

layout::LowLatencyMessage combine_message(const LowLatencyShape& shape, int num_ranks, bool uses_logfmt) {
    if (!uses_logfmt) return dispatch_message(shape, num_ranks, false);
    return make_message(shape, num_ranks, layout::LogfmtRow::make(static_cast<uint64_t>(shape.hidden)).bytes, 0);
}

}  // namespace

int64_t Buffer::low_latency_size_hint(int num_max_tokens, int hidden, int num_ranks, int num_experts) {
    const LowLatencyShape shape{num_max_tokens, kHintTopk, num_experts, hidden};
    check_shape(shape, 0, num_ranks);
    const auto message = dispatch_message(shape, num_ranks, false);
    using Slots = layout::LowLatencyEntrySlots;
    const uint64_t entry_bytes =
        Slots::bytes(static_cast<uint64_t>(num_max_tokens), Slots::kHintTopk, static_cast<uint64_t>(hidden));
    return static_cast<int64_t>(
        std::max(message.region_bytes(static_cast<uint64_t>(num_ranks)), layout::kNumLowLatencyBanks * entry_bytes));
}

uint8_t* Buffer::low_latency_data() const { return data() + options_.num_data_bytes; }

int* Buffer::masked_ranks() const {
    require_usable();
    return masked_.get();
}

// A warp for every chunk of a row, and one block on an SM. Kernels of ranks that share a GPU wait for each other, so all of
// them have to fit.
LowLatencyGrid Buffer::plan_low_latency(int hidden) const {
    const int most = std::min(kernels::kMaxLowLatencyThreads / 32, device_->useful_block_threads() / 64);
    const int num_warps = std::clamp((hidden + kChunk - 1) / kChunk, std::min(kMinWarps, most), most);
    return {std::max(1, device_->num_sms() / heap_->num_ranks_here()), num_warps};
}

kernels::LowLatencyCall Buffer::low_latency_call(const LowLatencyShape& shape, const layout::LowLatencyMessage& message,
                                                 int64_t* wait_stats, uint64_t* number) const {
    const auto needed = static_cast<int64_t>(message.region_bytes(static_cast<uint64_t>(options_.num_ranks)));
    EP_CHECK(needed <= options_.num_low_latency_bytes, "num_rdma_bytes is too small for this call: expected at least ",
             needed, ", got ", options_.num_low_latency_bytes, " (see Buffer.get_low_latency_rdma_size_hint)");
    const LowLatencyGrid grid = plan_low_latency(shape.hidden);
    const int num_local_experts = shape.num_experts / options_.num_ranks;
    return {.heap = heap_params(),
            .watch = watch_params(),
            .message = message,
            .uses_packets = false,
            .entry_slot_bytes = 0,
            .data_offset = control_.bytes + static_cast<uint64_t>(options_.num_data_bytes),
            .region = layout::LowLatencyRegion::make(static_cast<uint64_t>(options_.num_low_latency_bytes),
                                                     static_cast<uint64_t>(options_.num_ranks)),
            .phase = kernels::Phase::kSend,
            .number = number,
            .num_blocks = grid.num_blocks,
            .num_warps = grid.num_warps,
            .masked = masked_.get(),
            .is_shrinkable = options_.is_shrinkable,
            .decisions = wait_ns_.get() + options_.num_ranks,
            .wait_ns = wait_ns_.get(),
            .wait_stats = wait_stats,
            .num_max_tokens = shape.num_max_tokens,
            .num_topk = shape.num_topk,
            .num_experts = shape.num_experts,
            .num_local_experts = num_local_experts,
            .hidden = shape.hidden};
}

kernels::LowLatencyDispatchParams Buffer::low_latency_params(const LowLatencyDispatchArgs& args) const {
    check_shape(args.shape, args.num_tokens, options_.num_ranks);
    EP_CHECK(!args.is_fp8 || args.shape.hidden % layout::kFp8GroupSize == 0, "hidden must be a multiple of ",
             layout::kFp8GroupSize, " with use_fp8, got ", args.shape.hidden);
    EP_CHECK(!args.packs_scales || (args.rounds_scales && args.shape.hidden % (4 * layout::kFp8GroupSize) == 0),
             "use_ue8m0 needs round_scale, and hidden must be a multiple of ", 4 * layout::kFp8GroupSize, ", got ",
             args.shape.hidden);
    return {.call = low_latency_call(args.shape, dispatch_message(args.shape, options_.num_ranks, args.is_fp8),
                                     args.wait_stats, args.number),
            .payload = args.is_fp8 ? kernels::Payload::kFp8 : kernels::Payload::kBf16,
            .rounds_scales = args.rounds_scales,
            .packs_scales = args.packs_scales,
            .x = args.x,
            .topk_idx = args.topk_idx,
            .idx_bytes = args.idx_bytes,
            .num_tokens = args.num_tokens,
            .recv_x = args.recv_x,
            .recv_scales = args.recv_scales,
            .recv_count = args.recv_count,
            .src_info = args.src_info,
            .layout_range = args.layout_range,
            .row_of_entry = args.row_of_entry,
            .cumulative_stats = args.cumulative_stats,
            .num_set_words = set_words(args.shape, args.num_tokens)};
}

kernels::LowLatencyCombineParams Buffer::low_latency_params(const LowLatencyCombineArgs& args) const {
    check_shape(args.shape, args.num_tokens, options_.num_ranks);
    auto call = low_latency_call(args.shape, combine_message(args.shape, options_.num_ranks, args.uses_logfmt),
                                 args.wait_stats, args.number);
    using Slots = layout::LowLatencyEntrySlots;
    const auto hidden = static_cast<uint64_t>(args.shape.hidden);
    const uint64_t entry_bytes = Slots::bytes(static_cast<uint64_t>(args.shape.num_max_tokens),
                                              static_cast<uint64_t>(args.shape.num_topk), hidden);
    call.entry_slot_bytes = Slots::slot_bytes(hidden);
    // Where a source may be left out its weights count as a whole or not at all, which is what one flag says.
    call.uses_packets = !options_.is_shrinkable && args.shape.num_topk <= Slots::kMaxTopk &&
                        2 * args.shape.num_max_tokens * args.shape.num_topk <= layout::kMaxLowLatencyPackets &&
                        entry_bytes <= call.region.bank_bytes;
    return {.call = call,
            .uses_logfmt = args.uses_logfmt,
            .x = args.x,
            .topk_idx = args.topk_idx,
            .idx_bytes = args.idx_bytes,
            .topk_weights = args.topk_weights,
            .num_tokens = args.num_tokens,
            .row_of_entry = args.row_of_entry,
            .combined_x = args.combined_x};
}

void Buffer::clean_low_latency(dev::Stream stream) {
    check();
    const auto num_open = std::count_if(std::begin(open_low_latency_calls_), std::end(open_low_latency_calls_),
                                        [](uint64_t ticket) { return ticket != 0; });
    if (num_open > 0)
        throw Error(concat("clean_low_latency_buffer: no low-latency call may be open, and ", num_open,
                           num_open == 1 ? " is" : " are", ": call the hook first"));
    kernels::LowLatencyCall call{};
    call.heap = heap_params();
    call.watch = watch_params();
    call.masked = masked_.get();
    call.is_shrinkable = options_.is_shrinkable;
    announce(stream, true);
    kernels_->low_latency_clean(call, stream);
}

void Buffer::open_low_latency_call(kernels::LowLatencyCall& call) {
    // The new call waits until the bank has been read, so a call that still holds it could never be received.
    uint64_t& holder = open_low_latency_calls_[(num_low_latency_sends_ + 1) % layout::kNumLowLatencyBanks];
    if (holder != 0)
        throw Error(concat("at most ", layout::kNumLowLatencyBanks,
                           " low-latency calls may be open at a time: call the "
                           "hook of the call before the last one first"));
    call.phase = kernels::Phase::kSend;
    holder = ++num_low_latency_sends_;
}

void Buffer::make_whole_low_latency_call(kernels::LowLatencyCall& call) {
    open_low_latency_call(call);
    close_low_latency_call(call, num_low_latency_sends_);
    call.phase = kernels::Phase::kBoth;
}

void Buffer::close_low_latency_call(kernels::LowLatencyCall& call, uint64_t ticket) {
    uint64_t& holder = open_low_latency_calls_[ticket % layout::kNumLowLatencyBanks];
    EP_ENSURE(holder == ticket, "this hook belongs to a call that is over");
    holder = 0;
    call.phase = kernels::Phase::kReceive;
}

void Buffer::abandon_hook(uint64_t ticket, const std::string& text) {
    if (heap_ == nullptr || open_low_latency_calls_[ticket % layout::kNumLowLatencyBanks] != ticket) return;
    fail_unfinished(text, true);
}

void Buffer::low_latency_dispatch(const LowLatencyDispatchArgs& args, dev::Stream stream) {
    check();
    auto params = low_latency_params(args);
    make_whole_low_latency_call(params.call);
    announce(stream, true);
    kernels_->low_latency_dispatch(params, stream);
}

void Buffer::low_latency_combine(const LowLatencyCombineArgs& args, dev::Stream stream) {
    check();
    auto params = low_latency_params(args);
    make_whole_low_latency_call(params.call);
    announce(stream, true);
    kernels_->low_latency_combine(params, stream);
}

uint64_t Buffer::send_low_latency_dispatch(const LowLatencyDispatchArgs& args, dev::Stream stream) {
    check();
    auto params = low_latency_params(args);
    open_low_latency_call(params.call);
    announce(stream, true);
    kernels_->low_latency_dispatch(params, stream);
    return num_low_latency_sends_;
}

void Buffer::receive_low_latency_dispatch(const LowLatencyDispatchArgs& args, uint64_t ticket, dev::Stream stream) {
    begin_call();
    auto params = low_latency_params(args);
    close_low_latency_call(params.call, ticket);
    announce(stream, true);
    kernels_->low_latency_dispatch(params, stream);
}

uint64_t Buffer::send_low_latency_combine(const LowLatencyCombineArgs& args, dev::Stream stream) {
    check();
    auto params = low_latency_params(args);
    open_low_latency_call(params.call);
    announce(stream, true);
    kernels_->low_latency_combine(params, stream);
    return num_low_latency_sends_;
}

void Buffer::receive_low_latency_combine(const LowLatencyCombineArgs& args, uint64_t ticket, dev::Stream stream) {
    begin_call();
    auto params = low_latency_params(args);
    close_low_latency_call(params.call, ticket);
    announce(stream, true);
    kernels_->low_latency_combine(params, stream);
}

}  // namespace deep_ep::runtime
