#include "runtime/count_exchange.h"

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

}  // namespace deep_ep::runtime
