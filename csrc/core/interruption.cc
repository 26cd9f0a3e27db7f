#include "core/interruption.h"

#include <atomic>

namespace deep_ep {

namespace {
std::atomic<void (*)()> interruption_check{nullptr};
}

void set_interruption_check(void (*check)()) { interruption_check.store(check); }

void InterruptionPoll::poll() {
    const auto now = std::chrono::steady_clock::now();
    if (now < next_) return;
    next_ = now + kInterval;
    if (auto* check = interruption_check.load()) check();
}

}  // namespace deep_ep
