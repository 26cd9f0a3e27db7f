#include "runtime/loans.h"

#include "core/error.h"

namespace deep_ep::runtime {

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

layout::Loan Loans::loan_for(const kernels::DispatchArgs& args) const {
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

layout::Loan Loans::loan_for(const kernels::CombineArgs& args) const {
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

float* Loans::weights() const { return reinterpret_cast<float*>(connection_.local(connection_.plan().weights_offset)); }

}  // namespace deep_ep::runtime
