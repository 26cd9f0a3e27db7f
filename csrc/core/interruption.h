// Whoever embeds this library may want to be asked, while a call waits, whether it should go on: Python, for Ctrl-C.
#pragma once

#include <chrono>

namespace deep_ep {

// `check` may throw, which ends the wait. It is called by host threads that wait, without any lock.
void set_interruption_check(void (*check)());

// One wait: poll() is called as often as one likes and asks every 50 ms.
class InterruptionPoll {
public:
    static constexpr std::chrono::milliseconds kInterval{50};
    void poll();

private:
    std::chrono::steady_clock::time_point next_ = std::chrono::steady_clock::now() + kInterval;
};

}  // namespace deep_ep
