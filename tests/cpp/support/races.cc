#include "support/races.h"

#if defined(EP_SIMT_TSAN)
#define EP_UNSEEN __attribute__((disable_sanitizer_instrumentation))

namespace {
int num_reported = 0;
int num_expected = 0;
}  // namespace

// ThreadSanitizer calls these. They run while it holds its locks, so they must not be instrumented.
extern "C" EP_UNSEEN void __tsan_on_report(void*) { ++num_reported; }
namespace __tsan {
EP_UNSEEN bool OnFinalize(bool) { return num_reported > num_expected; }
}  // namespace __tsan

namespace deep_ep::testing {
EP_UNSEEN int num_races() { return num_reported; }
EP_UNSEEN void expect_races(int count) { num_expected += count; }
}  // namespace deep_ep::testing

#else

namespace deep_ep::testing {
int num_races() { return 0; }
void expect_races(int) {}
}  // namespace deep_ep::testing

#endif
