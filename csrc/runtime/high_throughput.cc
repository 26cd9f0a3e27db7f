#include "runtime/high_throughput.h"

#include "core/error.h"
#include "core/host_word.h"

namespace deep_ep::runtime {

namespace {

constexpr double kStartGraceSeconds = 30.0;  // for kernels queued before ours, on top of the kernel's own deadline

}  // namespace

CountExchange::CountExchange(Connection& connection) : connection_(connection), counts_(connection.device()) {}

void CountExchange::check_experts(int num_experts) const {
    const int num_ranks = connection_.topology().num_ranks;
    check_num_experts(num_experts, num_ranks);
    EP_CHECK(num_experts / num_ranks <= layout::kMaxLocalExperts, "a rank can have at most ", layout::kMaxLocalExperts,
             " experts, got ", num_experts / num_ranks);
}

uint64_t CountExchange::begin(int num_local_experts) {
    num_local_experts_ = num_local_experts;
    return ++ticket_;
}

RecvCounts CountExchange::wait() {
    connection_.require_usable();
    const BufferOptions& options = connection_.options();
    const double limit_s = 2 * options.timeout_s + kStartGraceSeconds;
    if (!connection_.wait_until([&] { return load_acquire(counts_->ready) == ticket_; }, limit_s)) {
        const bool has_entered = load_acquire(counts_->entered) == ticket_;
        connection_.fail(FailureClass::kTimeout,
                         concat("DeepEP timeout: dispatch on rank ", options.rank, ": the host waited ", limit_s,
                                has_entered ? " s for the count exchange, whose kernel runs but does not report."
                                            : " s for the count exchange, whose kernel has not begun: work queued on "
                                              "the device before it does not end."),
                         Spread::kPeers);
        connection_.check();
    }
    const int* counts = counts_->num_recv_per_expert;
    return {counts_->num_recv_tokens, std::vector<int>(counts, counts + num_local_experts_), counts_->num_rail_tokens};
}

Loans::Loans(Connection& connection)
    : connection_(connection),
      lender_(std::make_shared<Lender>(connection.device(), connection.plan().num_lend_bytes)) {}

std::vector<std::unique_ptr<LentMemory>> Loans::lend(const std::vector<int64_t>& sizes, dev::Stream stream,
                                                     bool is_captured) {
    connection_.require_usable();
    for (int64_t size : sizes) EP_ENSURE(size > 0, "every size must be positive, got ", size);
    const std::vector<uint64_t> wanted(sizes.begin(), sizes.end());
    const uint64_t lend_offset = connection_.plan().lend_offset;
    std::vector<std::unique_ptr<LentMemory>> lent;
    for (uint64_t offset : is_captured ? lender_->take_for_graph(wanted, stream) : lender_->take(wanted, stream))
        lent.push_back(std::make_unique<LentMemory>(lender_, offset, connection_.local(lend_offset + offset),
                                                    connection_.heap().lease()));
    return lent;
}

// From the start of the heap; 0: the address is not in the part that is lent.
uint64_t Loans::lent_offset(const void* address) const {
    const uint64_t lend_offset = connection_.plan().lend_offset;
    const auto begin = reinterpret_cast<uintptr_t>(connection_.local(lend_offset));
    const auto at = reinterpret_cast<uintptr_t>(address);
    return at < begin || at >= begin + lender_->num_bytes() ? 0 : at - begin + lend_offset;
}

layout::Loan Loans::loan_for(const DispatchArgs& args) const {
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

layout::Loan Loans::loan_for(const CombineArgs& args) const {
    if (!may_lend()) return {};
    layout::Loan loan{.x = lent_offset(args.x), .num_rows = static_cast<uint64_t>(args.num_rows)};
    if (loan.x == 0 || args.num_topk == 0) return loan;
    const uint64_t weight_bytes =
        sizeof(float) * static_cast<uint64_t>(args.num_rows) * static_cast<uint64_t>(args.num_topk);
    if (weight_bytes > connection_.plan().num_weight_bytes)
        return {};  // no room for a copy: rows and weights go through slots
    loan.topk_weights = connection_.plan().weights_offset;
    return loan;
}

layout::Loan Loans::sums_for(const CombineArgs& args) const {
    const auto num_tokens = static_cast<uint64_t>(args.num_tokens);
    const bool has_bias = args.bias[0] != nullptr || args.bias[1] != nullptr;
    const uint64_t weight_bytes = sizeof(float) * num_tokens * static_cast<uint64_t>(args.num_topk);
    if (!may_lend() || has_bias || num_tokens > layout::kMaxWindow ||
        weight_bytes > connection_.plan().num_weight_bytes)
        return {};
    const uint64_t sums = lent_offset(args.combined_x);
    if (sums == 0) return {};
    return {.topk_weights = connection_.plan().weights_offset, .num_rows = num_tokens, .sums = sums};
}

float* Loans::weights() const { return reinterpret_cast<float*>(connection_.local(connection_.plan().weights_offset)); }

HighThroughput::HighThroughput(Connection& connection, const kernels::KernelTable& kernels)
    : connection_(connection),
      kernels_(kernels),
      loans_(connection),
      counts_(connection),
      layout_partials_(connection.device(),
                       kernels::kMaxLayoutBlocks * static_cast<size_t>(max_layout_counts(connection.machine()))) {}

void HighThroughput::release() noexcept {
    layout_partials_.reset();
    counts_.release();
}

void HighThroughput::get_dispatch_layout(const LayoutArgs& args, dev::Stream stream) {
    const Machine& machine = connection_.machine();
    const int num_ranks = connection_.topology().num_ranks;
    connection_.check();
    check_num_tokens(args.num_tokens);
    check_num_experts(args.num_experts, num_ranks);
    EP_CHECK(args.num_nodes > 0 && num_ranks % args.num_nodes == 0, "num_nodes must divide the ", num_ranks,
             " ranks, got ", args.num_nodes);
    const int max_experts = max_layout_counts(machine) - num_ranks - args.num_nodes;
    EP_CHECK(args.num_experts <= max_experts, "num_experts must be at most ", max_experts, ", got ", args.num_experts);
    connection_.launch(kernels_.layout,
                       {{.num_ranks = num_ranks,
                         .partials = layout_partials_.get(),
                         .grid = plan_layout(machine, args.num_tokens),
                         .watch = connection_.watch_params()},
                        args},
                       stream);
}

void HighThroughput::check_call() {
    EP_ENSURE(connection_.topology().num_nodes() == 1, "this call is for a Buffer within one node");
    connection_.check();
}

kernels::NotifyDispatchPlan HighThroughput::notify_plan(const NotifyArgs& args) {
    counts_.check_experts(args.num_experts);
    check_dispatch_rows(args.num_tokens, args.row_bytes);
    static_cast<void>(plan_window(connection_.plan(), dispatch_slot(args), "dispatch"));  // it would be too late later
    const bool tells_host = args.expert_alignment > 0;
    const int num_local = num_local_experts(args.num_experts);
    const uint64_t ticket = tells_host ? counts_.begin(num_local) : counts_.ticket();
    return {.heap = connection_.heap_params(),
            .watch = connection_.watch_params(),
            .num_local_experts = num_local,
            .counts = tells_host ? counts_.counts() : nullptr,
            .ticket = ticket,
            .num_threads = plan_notify_threads(connection_.machine())};
}

void HighThroughput::notify_dispatch(const NotifyArgs& args, dev::Stream stream) {
    check_call();
    EP_CHECK(args.expert_alignment > 0, "expert_alignment must be positive, got ", args.expert_alignment);
    const kernels::NotifyDispatchPlan plan = notify_plan(args);
    connection_.announce(stream, false);
    connection_.launch(kernels_.notify_dispatch, {plan, args}, stream);
}

kernels::DispatchPlan HighThroughput::dispatch_plan(const DispatchArgs& args) {
    EP_ENSURE(!args.is_cached || args.is_token_in_rank == nullptr, "a cached dispatch scans no tokens");
    check_dispatch_rows(args.num_tokens, args.row_bytes);
    const layout::SlotLayout slot = dispatch_slot(args);
    const layout::WindowLayout window = plan_window(connection_.plan(), slot, "dispatch");
    const layout::Loan loan = loans_.loan_for(args);
    const bool tells_host = args.expert_alignment > 0;
    const int num_local = num_local_experts(args.num_experts);
    const uint64_t ticket = tells_host ? counts_.begin(num_local) : counts_.ticket();
    return {.heap = connection_.heap_params(),
            .watch = connection_.watch_params(),
            .geometry = {},
            .slot = slot,
            .window = window,
            .is_first_kernel = args.is_cached || args.num_tokens_per_rank != nullptr,
            .may_lend = loans_.may_lend(),
            .loan = loan,
            .num_local_experts = num_local,
            .counts = tells_host ? counts_.counts() : nullptr,
            .ticket = ticket};
}

void HighThroughput::dispatch(const DispatchArgs& args, int num_sms, dev::Stream stream) {
    check_call();
    const bool exchanges_counts = args.num_tokens_per_rank != nullptr;
    if (exchanges_counts) counts_.check_experts(args.num_experts);
    EP_ENSURE(exchanges_counts || args.expert_alignment <= 0,
              "expert_alignment: the counts of this call have been exchanged before");
    kernels::DispatchPlan plan = dispatch_plan(args);
    plan.geometry = plan_dispatch(connection_.machine(), num_sms, plan.slot, plan.loan.x != 0);
    connection_.announce(stream, false);
    connection_.launch(kernels_.dispatch, {plan, args}, stream);
}

kernels::CombinePlan HighThroughput::combine_plan(const CombineArgs& args) const {
    const uint32_t row_bytes = check_combine_rows(args.num_tokens, args.hidden);
    const layout::SlotLayout slot = combine_slot(args);
    return {.heap = connection_.heap_params(),
            .watch = connection_.watch_params(),
            .geometry = {},
            .slot = slot,
            .window = plan_combine_window(connection_.machine(), connection_.plan(), slot),
            .may_lend = loans_.may_lend(),
            .loan = loans_.loan_for(args),
            .lent_weights = loans_.weights(),
            .row_bytes = row_bytes};
}

void HighThroughput::combine(const CombineArgs& args, int num_sms, dev::Stream stream) {
    check_call();
    kernels::CombinePlan plan = combine_plan(args);
    plan.geometry = plan_combine(connection_.machine(), num_sms, plan.slot, plan.loan.x != 0,
                                 args.bias[0] != nullptr || args.bias[1] != nullptr, args.num_tokens);
    if (const auto adding = plan_adding_combine(connection_.machine(), num_sms); adding && !plan.loan.is_any()) {
        plan.loan = loans_.sums_for(args);
        if (plan.loan.is_any()) plan.geometry = *adding;
    }
    connection_.announce(stream, false);
    connection_.launch(kernels_.combine, {plan, args}, stream);
}

}  // namespace deep_ep::runtime
