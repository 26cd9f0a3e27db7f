#include "runtime/intranode.h"

#include <algorithm>

#include "core/error.h"

namespace deep_ep::runtime {

void Intranode::notify_dispatch(const NotifyArgs& args, dev::Stream stream) {
    connection_.check();
    counts_.check_experts(args.num_experts);
    EP_CHECK(args.expert_alignment > 0, "expert_alignment must be positive, got ", args.expert_alignment);
    check_dispatch_rows(args.num_tokens, args.row_bytes);
    static_cast<void>(plan_window(connection_.plan(), dispatch_slot(args), "dispatch"));  // it would be too late later
    connection_.announce(stream, false);
    const int num_local = num_local_experts(args.num_experts);
    const uint64_t ticket = counts_.begin(num_local);
    kernels_.notify_dispatch({{.heap = connection_.heap_params(),
                               .watch = connection_.watch_params(),
                               .num_local_experts = num_local,
                               .counts = counts_.counts(),
                               .ticket = ticket,
                               .num_threads = plan_notify_threads(connection_.machine())},
                              args},
                             stream);
}

void Intranode::dispatch(const DispatchArgs& args, int num_sms, dev::Stream stream) {
    connection_.check();
    const bool exchanges_counts = args.num_tokens_per_rank != nullptr;
    const bool tells_host = args.expert_alignment > 0;
    if (exchanges_counts) counts_.check_experts(args.num_experts);
    EP_ENSURE(!args.is_cached || args.is_token_in_rank == nullptr, "a cached dispatch scans no tokens");
    EP_ENSURE(exchanges_counts || !tells_host, "expert_alignment: the counts of this call have been exchanged before");
    check_dispatch_rows(args.num_tokens, args.row_bytes);
    const layout::SlotLayout slot = dispatch_slot(args);
    const layout::WindowLayout window = plan_window(connection_.plan(), slot, "dispatch");
    const layout::Loan loan = loans_.loan_for(args);
    const int num_local = num_local_experts(args.num_experts);
    const uint64_t ticket = tells_host ? counts_.begin(num_local) : counts_.ticket();
    connection_.announce(stream, false);
    kernels_.dispatch({{.heap = connection_.heap_params(),
                        .watch = connection_.watch_params(),
                        .geometry = plan_dispatch(connection_.machine(), num_sms, slot, loan.x != 0),
                        .slot = slot,
                        .window = window,
                        .is_first_kernel = args.is_cached || exchanges_counts,
                        .may_lend = loans_.may_lend(),
                        .loan = loan,
                        .num_local_experts = num_local,
                        .counts = tells_host ? counts_.counts() : nullptr,
                        .ticket = ticket},
                       args},
                      stream);
}

void Intranode::combine(const CombineArgs& args, int num_sms, dev::Stream stream) {
    connection_.check();
    const uint32_t row_bytes = check_combine_rows(args.num_tokens, args.hidden);
    const layout::SlotLayout slot = combine_slot(args);
    const layout::WindowLayout window = plan_window(connection_.plan(), slot, "combine");
    const layout::Loan loan = loans_.loan_for(args);
    connection_.announce(stream, false);
    kernels_.combine({{.heap = connection_.heap_params(),
                       .watch = connection_.watch_params(),
                       .geometry = plan_combine(connection_.machine(), num_sms, slot, loan.x != 0),
                       .slot = slot,
                       .window = window,
                       .may_lend = loans_.may_lend(),
                       .loan = loan,
                       .lent_weights = loans_.weights(),
                       .row_bytes = row_bytes},
                      args},
                     stream);
}

}  // namespace deep_ep::runtime
