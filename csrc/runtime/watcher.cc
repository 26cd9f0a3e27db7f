#include "runtime/watcher.h"

#include <pthread.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "core/error.h"

namespace deep_ep::runtime {

namespace {

constexpr auto kInterval = std::chrono::milliseconds(100);
constexpr auto kExitPatience = std::chrono::seconds(2);

class Watcher {
public:
    void add(const std::shared_ptr<FailureDesk>& desk) {
        const std::lock_guard lock(mutex_);
        if (is_stopping_) return;  // the process is at its end
        desks_.push_back(desk);
        if (!is_running_) std::thread([this] { run(); }).detach();
        is_running_ = true;
    }

    // When this returns nobody is looked at any more, unless a look hangs with its device: the wait is bounded. (Tries, and
    // not a lock with a deadline: ThreadSanitizer does not know that one.)
    void stop() {
        is_stopping_ = true;
        const auto deadline = std::chrono::steady_clock::now() + kExitPatience;
        while (!mutex_.try_lock()) {
            if (std::chrono::steady_clock::now() >= deadline) return;
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
        }
        mutex_.unlock();
    }

    // Around fork(): the child must not inherit a mutex that a thread holds which it has not.
    void lock() { mutex_.lock(); }
    void unlock() { mutex_.unlock(); }

private:
    void run() {
        prctl(PR_SET_NAME, "deep_ep watch", 0, 0, 0);
        for (;;) {
            {
                const std::lock_guard lock(mutex_);
                if (is_stopping_) return;
                look();
            }
            std::this_thread::sleep_for(kInterval);
        }
    }

    void look() {
        std::erase_if(desks_, [](const std::weak_ptr<FailureDesk>& watched) {
            const auto desk = watched.lock();
            if (desk == nullptr) return true;
            try {
                const std::string failure = desk->look();
                if (failure.empty()) return false;
                // One write, so that lines of several ranks do not mix.
                const std::string line = failure +
                                         " (Calls on this Buffer raise it; a loop that only replays graphs "
                                         "must call Buffer.check.)\n";
                static_cast<void>(!write(STDERR_FILENO, line.data(), line.size()));
                return true;
            } catch (const Error&) {
                return true;  // the device is out of order, and every call will say so
            }
        });
    }

    std::mutex mutex_;  // held while looking
    std::vector<std::weak_ptr<FailureDesk>> desks_;
    bool is_running_ = false;
    std::atomic<bool> is_stopping_{false};
};

// Never destroyed: the thread may outlive static objects.
Watcher& watcher() {
    static auto* const instance = new Watcher;
    return *instance;
}

// The thread does not exist in the child, and those whom it watched are the parent's.
void start_anew_in_child() { new (&watcher()) Watcher; }

}  // namespace

void watch(const std::shared_ptr<FailureDesk>& desk) {
    static const int hooks [[maybe_unused]] = [] {
        watcher();
        pthread_atfork([] { watcher().lock(); }, [] { watcher().unlock(); }, start_anew_in_child);
        return std::atexit([] { watcher().stop(); });
    }();
    watcher().add(desk);
}

}  // namespace deep_ep::runtime
