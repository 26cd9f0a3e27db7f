// libstdc++ of GCC 12 and later takes random numbers from arc4random, which only glibc 2.36 and later have. An extension
// with libstdc++ inside (EP_PORTABLE) brings its own, so that it runs on Ubuntu 22.04 and Red Hat 9 as well.
#include <sys/random.h>

extern "C" unsigned arc4random() noexcept {
    unsigned number = 0;
    while (getrandom(&number, sizeof(number), 0) != static_cast<ssize_t>(sizeof(number))) {
        // Interrupted before the system has gathered entropy: once, while it boots.
    }
    return number;
}
