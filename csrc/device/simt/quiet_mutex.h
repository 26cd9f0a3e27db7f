// The executor's mutex. ThreadSanitizer must not take it for synchronisation: it would order ranks that nothing else
// orders. (Sources of the executor are not instrumented, so a spin lock made of atomics escapes it.)
#pragma once

#include <atomic>
#include <mutex>

namespace deep_ep::simt {

#if defined(EP_SIMT_TSAN)
class QuietMutex {
public:
    void lock() {
        while (is_held_.test_and_set(std::memory_order_acquire)) {
        }
    }
    void unlock() { is_held_.clear(std::memory_order_release); }

private:
    std::atomic_flag is_held_ = ATOMIC_FLAG_INIT;
};
#else
using QuietMutex = std::mutex;
#endif

}  // namespace deep_ep::simt
