#include "runtime/buffer.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "core/error.h"
#include "core/interruption.h"
#include "runtime/story.h"
#include "runtime/watcher.h"

namespace deep_ep::runtime {

namespace {

// A lane stands for each rank and each bias.
constexpr int kMaxStagedRanks = 32 - kernels::kMaxBiases;
constexpr int kMaxStages = 4;
constexpr int kReduceWarps = 8;
constexpr double kStartGraceSeconds = 30.0;  // for kernels queued before ours, on top of the kernel's own deadline

// Host-mapped words are written by kernels; the host reads them as the other side of a release.
template <class T> T load_acquire(const T& word) { return std::atomic_ref(const_cast<T&>(word)).load(); }

uint64_t to_ns(double s) { return static_cast<uint64_t>(s * 1e9); }

const kernels::KernelTable& table_for(dev::DeviceKind kind) {
#if EP_WITH_CUDA
    if (kind == dev::DeviceKind::kCuda) return kernels::cuda_kernel_table();
#endif
    EP_ENSURE(kind == dev::DeviceKind::kCpu, "this build has no CUDA kernels");
    return kernels::simt_kernel_table();
}

const BufferOptions& checked(const BufferOptions& options) {
    EP_CHECK(options.num_ranks > 0 && options.num_ranks <= layout::kMaxRanks, "num_ranks must be in [1, ",
             layout::kMaxRanks, "], got ", options.num_ranks);
    EP_CHECK(options.rank >= 0 && options.rank < options.num_ranks, "rank must be in [0, ", options.num_ranks,
             "), got ", options.rank);
    EP_CHECK(options.num_data_bytes >= 0 && options.num_data_bytes % 128 == 0,
             "num_data_bytes must be a multiple of 128, got ", options.num_data_bytes);
    EP_CHECK(options.num_low_latency_bytes >= 0 && options.num_low_latency_bytes % 128 == 0,
             "num_low_latency_bytes must be a multiple of 128, got ", options.num_low_latency_bytes);
    EP_CHECK(
        options.num_lend_bytes == kLendPartOfData || (options.num_lend_bytes >= 0 && options.num_lend_bytes % 128 == 0),
        "num_lend_bytes must be a multiple of 128, got ", options.num_lend_bytes);
    EP_CHECK(options.timeout_s > 0, "timeout_s must be positive, got ", options.timeout_s);
    return options;
}

void check_tokens(int num_tokens) {
    EP_CHECK(num_tokens >= 0 && num_tokens < layout::kMaxTokens - 1, "number of tokens must be below ",
             layout::kMaxTokens - 1, ", got ", num_tokens);
}

bool is_captured(dev::Device& device, dev::Stream stream) noexcept {
    try {
        return device.stream_kind(stream) == dev::StreamKind::kCaptured;
    } catch (...) {
        return false;  // the device is out of order: that captures nothing
    }
}

void check_row(int64_t row_bytes) {
    EP_CHECK(row_bytes > 0 && row_bytes % 16 == 0, "a row must be a positive multiple of 16 bytes, got ", row_bytes);
    EP_CHECK(row_bytes < int64_t{1} << 31, "a row must be below 2 GiB, got ", row_bytes, " bytes");
}

}  // namespace

void check_num_experts(int num_experts, int num_ranks) {
    EP_CHECK(num_experts > 0 && num_experts % num_ranks == 0,
             "num_experts must be a positive multiple of the number of ranks (", num_ranks, "), got ", num_experts);
}

Buffer::Buffer(std::shared_ptr<dev::Device> device, const BufferOptions& options)
    : device_(std::move(device)),
      options_(checked(options)),
      kernels_(&table_for(device_->kind())),
      control_(layout::ControlLayout::make(static_cast<uint64_t>(options.num_ranks))) {
    divide_heap();
    mailbox_ = std::make_shared<comm::Mailbox>(options_.rank, options_.num_ranks);
    heap_ = std::make_unique<comm::SymmetricHeap>(device_, mailbox_, options_.num_ranks, num_heap_bytes_);
    status_ = dev::HostMappedObject<layout::HostStatus>(device_);
    counts_ = dev::HostMappedObject<layout::HostCounts>(device_);
    desk_ = std::make_shared<FailureDesk>(device_, mailbox_, *heap_, control_, status_.host(), options_.num_ranks);
    local_ = dev::DeviceArray<layout::LocalState>(device_, 1);
    const auto num_ranks = static_cast<size_t>(options_.num_ranks);
    masked_ = dev::DeviceArray<int>(device_, num_ranks);
    wait_ns_ = dev::DeviceArray<uint64_t>(device_, 2 * num_ranks);
    // Here, not when first needed: that may be while a CUDA graph is captured.
    layout_partials_ =
        dev::DeviceArray<int>(device_, kernels::kMaxLayoutBlocks * static_cast<size_t>(max_layout_counts()));
}

// What is lent is a part of the data region, or a region of its own behind everything else.
void Buffer::divide_heap() {
    const auto num_data_bytes = static_cast<uint64_t>(options_.num_data_bytes);
    const uint64_t end = control_.bytes + num_data_bytes + static_cast<uint64_t>(options_.num_low_latency_bytes);
    layout::DataSplit split{num_data_bytes, 0, 0};
    weights_offset_ = end;
    num_heap_bytes_ = end;
    if (options_.num_lend_bytes == kLendPartOfData) {
        split = layout::DataSplit::make(num_data_bytes, static_cast<uint64_t>(options_.num_ranks));
        weights_offset_ = control_.bytes + split.slot_bytes;
    } else if (options_.num_lend_bytes > 0) {
        split.lend_bytes = static_cast<uint64_t>(options_.num_lend_bytes);
        split.weight_bytes =
            layout::align_up(split.lend_bytes / layout::DataSplit::kWeightShare, layout::DataSplit::kAlignment);
        weights_offset_ = layout::align_up(end, layout::DataSplit::kAlignment);
        num_heap_bytes_ = weights_offset_ + split.weight_bytes + split.lend_bytes;
    }
    num_slot_bytes_ = split.slot_bytes;
    num_weight_bytes_ = split.weight_bytes;
    lend_offset_ = weights_offset_ + num_weight_bytes_;
    lender_ = std::make_shared<Lender>(device_, split.lend_bytes);
}

// Ranks and experts that one layout kernel can count: a block keeps all counts in shared memory.
int Buffer::max_layout_counts() const {
    const int fitting = device_->max_shared_bytes() / static_cast<int>(sizeof(int));
    return std::min(fitting, options_.num_ranks * (1 + layout::kMaxLocalExperts));
}

Buffer::~Buffer() { destroy(0.0); }

// The handle of the mailbox, which has the same size everywhere, then that of the heap.
std::string Buffer::export_handle() const { return mailbox_->handle() + heap_->handle(); }

void Buffer::connect(const std::vector<std::string>& handles) {
    require_usable();
    const size_t border = mailbox_->handle().size();
    std::vector<std::string> of_mailboxes, of_heaps;
    for (const std::string& handle : handles) {
        of_mailboxes.push_back(handle.substr(0, border));
        of_heaps.push_back(handle.substr(std::min(border, handle.size())));
    }
    mailbox_->connect(of_mailboxes);
    heap_->connect(of_heaps);
}

uint8_t* Buffer::data() const {
    require_usable();
    return heap_->local() + control_.bytes;
}

void Buffer::require_usable() const {
    if (heap_ == nullptr) throw Error("this Buffer has been destroyed");
    desk_->check();
}

kernels::HeapParams Buffer::heap_params() const {
    EP_ENSURE(heap_->is_connected(), "this Buffer is not connected to its peers");
    kernels::HeapParams params{
        .bases = {}, .rank = options_.rank, .num_ranks = options_.num_ranks, .control = control_};
    for (int peer = 0; peer < options_.num_ranks; ++peer) params.bases[peer] = heap_->base(peer);
    return params;
}

kernels::WatchParams Buffer::watch_params() const {
    return {local_.get(), status_.device(), to_ns(options_.timeout_s), to_ns(options_.warn_s)};
}

int Buffer::stage_room(int state_bytes) const { return device_->max_shared_bytes() - state_bytes; }

// Rows through registers: enough warps to have many loads under way.
kernels::Geometry Buffer::plan_plain(int num_sms, int max_threads) const {
    const int warps = std::min(max_threads, device_->useful_block_threads()) / 32 / 2;
    return {.num_blocks = std::clamp(num_sms, 1, device_->num_sms()),
            .num_send_warps = warps,
            .num_recv_warps = warps,
            .send = {},
            .recv = {}};
}

// Whether staged kernels can run this geometry: lanes stand for ranks, and a warp has one peer at most.
bool Buffer::can_stage(const kernels::Geometry& geometry) const {
    const auto has_enough = [&](int num_warps) {
        return num_warps == 0 || geometry.num_blocks * num_warps >= options_.num_ranks - 1;
    };
    return device_->has_bulk_copy() && options_.num_ranks <= kMaxStagedRanks && has_enough(geometry.num_send_warps) &&
           has_enough(geometry.num_recv_warps);
}

// Send warps have stages where each of them gets two; fewer warps would move less than registers do. A rank that lends
// its outputs receives nothing by itself: all warps send, through registers (docs/performance/intranode.md, step 9).
kernels::Geometry Buffer::plan_dispatch(int num_sms, const layout::SlotLayout& slot, bool is_lent) const {
    kernels::Geometry plain = plan_plain(num_sms, kernels::kMaxDispatchThreads);
    if (is_lent) {
        plain.num_send_warps += std::exchange(plain.num_recv_warps, 0);
        return plain;
    }
    const layout::Staging stage{1, static_cast<int>(layout::bulk_bytes(slot.scales.end())) + layout::kPositionBytes};
    kernels::Geometry staged = plain;
    const int room = stage_room(kernels::kMaxDispatchState);
    staged.send = {std::min(room / (plain.num_send_warps * stage.bytes()), kMaxStages), stage.stage_bytes};
    return staged.send.num_stages >= 2 && can_stage(staged) ? staged : plain;
}

// Reduce warps have stages of a fixed size; send warps get the rest. A rank that lends its input sends nothing.
kernels::Geometry Buffer::plan_combine(int num_sms, const layout::SlotLayout& slot, bool is_lent) const {
    kernels::Geometry plain = plan_plain(num_sms, kernels::kMaxCombineThreads);
    if (is_lent) plain.num_recv_warps += std::exchange(plain.num_send_warps, 0);
    const int room = stage_room(kernels::kMaxCombineState);
    layout::Staging recv{layout::kReduceStages, layout::kReduceStageBytes};
    if (is_lent) {
        const kernels::Geometry lent{plain.num_blocks, 0, plain.num_recv_warps, {}, recv};
        return lent.num_recv_warps * recv.bytes() <= room && can_stage(lent) ? lent : plain;
    }
    const int reduce_warps = device_->kind() == dev::DeviceKind::kCuda ? kReduceWarps : plain.num_recv_warps;
    const layout::Staging send{1, static_cast<int>(layout::bulk_bytes(slot.topk_weights.end()))};
    const int fitting = (room - reduce_warps * recv.bytes()) / send.bytes();
    const int max_warps = std::min(kernels::kMaxCombineThreads, device_->useful_block_threads()) / 32;
    const int send_warps = std::min(max_warps - reduce_warps, fitting / 2);
    if (send_warps <= 0) return plain;
    const int num_stages = std::min(fitting / send_warps, kMaxStages);
    const kernels::Geometry staged{plain.num_blocks, send_warps, reduce_warps, {num_stages, send.stage_bytes}, recv};
    return can_stage(staged) ? staged : plain;
}

std::vector<std::unique_ptr<LentMemory>> Buffer::lend(const std::vector<int64_t>& sizes, dev::Stream stream,
                                                      bool is_captured) {
    require_usable();
    for (int64_t size : sizes) EP_ENSURE(size > 0, "every size must be positive, got ", size);
    const std::vector<uint64_t> wanted(sizes.begin(), sizes.end());
    std::vector<std::unique_ptr<LentMemory>> lent;
    for (uint64_t offset : is_captured ? lender_->take_for_graph(wanted, stream) : lender_->take(wanted, stream))
        lent.push_back(
            std::make_unique<LentMemory>(lender_, offset, heap_->local() + lend_offset_ + offset, heap_->lease()));
    return lent;
}

std::unique_ptr<LentMemory> Buffer::lend(int64_t num_bytes) {
    std::vector<std::unique_ptr<LentMemory>> lent = lend(std::vector<int64_t>{num_bytes}, nullptr, false);
    return lent.empty() ? nullptr : std::move(lent.front());
}

// From the start of the heap; 0: the address is not in the part that is lent.
uint64_t Buffer::lent_offset(const void* address) const {
    const auto begin = reinterpret_cast<uintptr_t>(heap_->local() + lend_offset_);
    const auto at = reinterpret_cast<uintptr_t>(address);
    return at < begin || at >= begin + lender_->num_bytes() ? 0 : at - begin + lend_offset_;
}

layout::Loan Buffer::loan_for(const DispatchArgs& args) const {
    if (!may_lend()) return {};
    const layout::Loan loan{lent_offset(args.recv_x),        lent_offset(args.recv_scales),
                            lent_offset(args.recv_topk_idx), lent_offset(args.recv_topk_weights),
                            lent_offset(args.recv_src_idx),  static_cast<uint64_t>(args.num_recv_rows)};
    if (loan.x == 0) return {};
    const auto is_lent = [](const void* address, uint64_t offset) { return address == nullptr || offset != 0; };
    EP_ENSURE((args.num_scales == 0 || loan.scales != 0) &&
                  (args.num_topk == 0 || (loan.topk_idx != 0 && loan.topk_weights != 0)) &&
                  is_lent(args.recv_src_idx, loan.src_idx),
              "recv_x is lent to the peers, so all outputs of the call must be");
    return loan;
}

layout::Loan Buffer::loan_for(const CombineArgs& args) const {
    if (!may_lend()) return {};
    layout::Loan loan{.x = lent_offset(args.x), .num_rows = static_cast<uint64_t>(args.num_rows)};
    if (loan.x == 0 || args.num_topk == 0) return loan;
    const uint64_t weight_bytes =
        sizeof(float) * static_cast<uint64_t>(args.num_rows) * static_cast<uint64_t>(args.num_topk);
    if (weight_bytes > num_weight_bytes_) return {};  // no room for a copy: rows and weights go through slots
    loan.topk_weights = weights_offset_;
    return loan;
}

// The smallest data region with which calls of such slots work.
uint64_t Buffer::num_data_bytes_for(const layout::SlotLayout& slot) const {
    const auto num_ranks = static_cast<uint64_t>(options_.num_ranks);
    const uint64_t slots = layout::WindowLayout::bytes_for(num_ranks, slot.bytes, 1);
    const bool is_divided = num_slot_bytes_ < static_cast<uint64_t>(options_.num_data_bytes);
    return is_divided ? layout::DataSplit::bytes_for(slots, 0, num_ranks) : slots;
}

layout::WindowLayout Buffer::window_for(const layout::SlotLayout& slot, const char* operation) const {
    const auto num_ranks = static_cast<uint64_t>(options_.num_ranks);
    const auto window = layout::WindowLayout::make(num_slot_bytes_, num_ranks, slot.bytes);
    EP_CHECK(options_.num_ranks == 1 || window.window > 0, "num_nvl_bytes is too small for this ", operation,
             ": expected at least ", num_data_bytes_for(slot), ", got ", options_.num_data_bytes,
             " (see Config.get_nvl_buffer_size_hint)");
    return window;
}

void Buffer::get_dispatch_layout(const LayoutArgs& args, dev::Stream stream) {
    check();
    check_tokens(args.num_tokens);
    check_num_experts(args.num_experts, options_.num_ranks);
    const int num_counts = options_.num_ranks + args.num_experts;
    EP_CHECK(num_counts <= max_layout_counts(), "num_experts must be at most ",
             max_layout_counts() - options_.num_ranks, ", got ", args.num_experts);
    const int max_blocks = std::min(kernels::kMaxLayoutBlocks, device_->num_sms());
    const int num_threads = std::min(kernels::kMaxLayoutThreads, device_->useful_block_threads());
    const int num_blocks = std::clamp((args.num_tokens + num_threads - 1) / num_threads, 1, max_blocks);
    kernels_->layout({args,
                      {.num_ranks = options_.num_ranks,
                       .partials = layout_partials_.get(),
                       .num_threads = num_threads,
                       .watch = watch_params()}},
                     num_blocks, stream);
}

void Buffer::check_counted_experts(int num_experts) const {
    check_num_experts(num_experts, options_.num_ranks);
    EP_CHECK(num_experts / options_.num_ranks <= layout::kMaxLocalExperts, "a rank can have at most ",
             layout::kMaxLocalExperts, " experts, got ", num_experts / options_.num_ranks);
}

void Buffer::notify_dispatch(const NotifyArgs& args, dev::Stream stream) {
    check();
    check_counted_experts(args.num_experts);
    EP_CHECK(args.expert_alignment > 0, "expert_alignment must be positive, got ", args.expert_alignment);
    check_dispatch_rows(
        args.num_tokens, args.row_bytes,
        layout::SlotLayout::for_dispatch(static_cast<uint64_t>(args.row_bytes), static_cast<uint64_t>(args.num_topk),
                                         static_cast<uint64_t>(args.num_scales)));
    ++ticket_;
    announce(stream, false);
    num_local_experts_ = args.num_experts / options_.num_ranks;
    kernels_->notify_dispatch({args,
                               {.heap = heap_params(),
                                .watch = watch_params(),
                                .num_local_experts = num_local_experts_,
                                .counts = counts_.device(),
                                .ticket = ticket_,
                                .num_threads = std::min(kernels::kMaxNotifyThreads, device_->useful_block_threads())}},
                              stream);
}

RecvCounts Buffer::wait_counts() {
    require_usable();
    InterruptionPoll interruption;
    const double limit_s = 2 * options_.timeout_s + kStartGraceSeconds;
    const bool is_done = device_->host_wait(
        [&] {
            collect_warning();
            interruption.poll();
            return load_acquire(counts_->ready) == ticket_ || load_acquire(status_->failure.state) != 0 ||
                   desk_->has_failed();
        },
        limit_s);
    check();
    if (!is_done) {
        const bool has_entered = load_acquire(counts_->entered) == ticket_;
        desk_->fail(FailureClass::kTimeout,
                    concat("DeepEP timeout: dispatch on rank ", options_.rank, ": the host waited ", limit_s,
                           has_entered ? " s for the count exchange, whose kernel runs but does not report."
                                       : " s for the count exchange, whose kernel has not begun: work queued on the "
                                         "device before it does not end."),
                    Spread::kPeers);
        check();
    }
    const int* counts = counts_->num_recv_per_expert;
    return {counts_->num_recv_tokens, std::vector<int>(counts, counts + num_local_experts_)};
}

layout::WindowLayout Buffer::check_dispatch_rows(int num_tokens, int64_t row_bytes,
                                                 const layout::SlotLayout& slot) const {
    check_tokens(num_tokens);
    check_row(row_bytes);
    return window_for(slot, "dispatch");
}

void Buffer::dispatch(const DispatchArgs& args, int num_sms, dev::Stream stream) {
    check();
    const bool exchanges_counts = args.num_tokens_per_rank != nullptr;
    const bool tells_host = args.expert_alignment > 0;
    if (exchanges_counts) check_counted_experts(args.num_experts);
    EP_ENSURE(!args.is_cached || args.is_token_in_rank == nullptr, "a cached dispatch scans no tokens");
    EP_ENSURE(exchanges_counts || !tells_host, "expert_alignment: the counts of this call have been exchanged before");
    const auto slot =
        layout::SlotLayout::for_dispatch(static_cast<uint64_t>(args.row_bytes), static_cast<uint64_t>(args.num_topk),
                                         static_cast<uint64_t>(args.num_scales));
    const layout::WindowLayout window = check_dispatch_rows(args.num_tokens, args.row_bytes, slot);
    const layout::Loan loan = loan_for(args);
    if (tells_host) {
        ++ticket_;
        num_local_experts_ = args.num_experts / options_.num_ranks;
    }
    announce(stream, false);
    kernels_->dispatch({args,
                        {.heap = heap_params(),
                         .watch = watch_params(),
                         .geometry = plan_dispatch(num_sms, slot, loan.x != 0),
                         .slot = slot,
                         .window = window,
                         .is_first_kernel = args.is_cached || exchanges_counts,
                         .may_lend = may_lend(),
                         .loan = loan,
                         .num_local_experts = args.num_experts / options_.num_ranks,
                         .counts = tells_host ? counts_.device() : nullptr,
                         .ticket = ticket_}},
                       stream);
}

void Buffer::combine(const CombineArgs& args, int num_sms, dev::Stream stream) {
    check();
    check_tokens(args.num_tokens);
    const int64_t row_bytes = int64_t{args.hidden} * 2;
    check_row(row_bytes);
    const auto slot =
        layout::SlotLayout::for_combine(static_cast<uint64_t>(row_bytes), static_cast<uint64_t>(args.num_topk));
    const layout::WindowLayout window = window_for(slot, "combine");
    const layout::Loan loan = loan_for(args);
    announce(stream, false);
    kernels_->combine({args,
                       {.heap = heap_params(),
                        .watch = watch_params(),
                        .geometry = plan_combine(num_sms, slot, loan.x != 0),
                        .slot = slot,
                        .window = window,
                        .may_lend = may_lend(),
                        .loan = loan,
                        .lent_weights = reinterpret_cast<float*>(heap_->local() + weights_offset_),
                        .row_bytes = static_cast<uint32_t>(row_bytes)}},
                      stream);
}

void Buffer::bench_push(int64_t bytes_per_peer, int num_sms, dev::Stream stream) {
    check();
    EP_CHECK(bytes_per_peer >= 0 && bytes_per_peer % 16 == 0, "bytes_per_peer must be a multiple of 16, got ",
             bytes_per_peer);
    EP_CHECK(bytes_per_peer <= options_.num_data_bytes / options_.num_ranks, "bytes_per_peer must be at most ",
             options_.num_data_bytes / options_.num_ranks, ", got ", bytes_per_peer);
    kernels_->push_all({.heap = heap_params(), .bytes_per_peer = static_cast<uint64_t>(bytes_per_peer)},
                       std::clamp(num_sms, 1, device_->num_sms()), stream);
}

void Buffer::collect_warning() {
    if (load_acquire(status_->warning.state) == 0) return;
    const Peers peers{.remark = [this](int peer) { return desk_->remark(peer); }, .reason = nullptr};
    const std::string text = describe_warning(
        status_->warning, options_.rank, read_started(*device_, *heap_, control_, status_->warning.operation), peers);
    std::atomic_ref(status_->warning.state).store(0);
    if (on_warning_) on_warning_(text);
}

void Buffer::check() {
    require_usable();
    collect_warning();
}

void Buffer::begin_call() {
    check();
    announced_ = {};
}

// From here on peers know, or will know, of the call that runs. (One that is captured into a graph is none yet.)
void Buffer::announce(dev::Stream stream, bool is_low_latency) {
    announced_ = {.is_set = true, .is_low_latency = is_low_latency, .stream = stream};
    if (std::exchange(is_refusal_told_, false)) mailbox_->withdraw_refusal();
}

void Buffer::abandon_call(const std::string& text) {
    if (heap_ == nullptr || desk_->has_failed()) return;
    if (announced_.is_set && !is_captured(*device_, announced_.stream)) {
        fail_unfinished(text, announced_.is_low_latency);
        return;
    }
    is_refusal_told_ = true;
    mailbox_->note_refusal(text);
}

// Peers that may leave this rank out of low-latency calls do so, and go on.
void Buffer::fail_unfinished(const std::string& text, bool is_low_latency) {
    desk_->fail(
        FailureClass::kOther,
        concat("DeepEP error: rank ", options_.rank, ": a call that the peers know of was not finished: ", text),
        is_low_latency && options_.is_shrinkable ? Spread::kNobody : Spread::kPeers);
}

void Buffer::start_watching() { watch(desk_); }

void Buffer::destroy(double timeout_s) noexcept {
    if (heap_ == nullptr) return;
    desk_->close();
    heap_->release(timeout_s);
    heap_.reset();
    mailbox_.reset();
    layout_partials_.reset();
    masked_.reset();
    wait_ns_.reset();
    local_.reset();
    counts_.reset();
    status_.reset();
}

}  // namespace deep_ep::runtime
