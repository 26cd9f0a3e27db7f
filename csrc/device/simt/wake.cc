#include <unistd.h>

#include "device/simt/access.h"

namespace deep_ep::simt {

// The exchange and the host's order the two: either it sees that the host sleeps, or the host sees what was released.
void wake_host(uint32_t* is_asleep, int event) {
    if (__atomic_exchange_n(is_asleep, 0u, __ATOMIC_ACQ_REL) == 0) return;
    const uint64_t one = 1;
    static_cast<void>(!write(event, &one, sizeof(one)));  // fails only when it is full, and then the host is awake
}

}  // namespace deep_ep::simt
