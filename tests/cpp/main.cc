#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include "races.h"

#if defined(EP_SIMT_TSAN)

namespace {
int num_reports = 0;
}

// ThreadSanitizer calls these two. Tests of planted faults count reports, hence none is suppressed as a repetition;
// a report that no test expects fails the test that saw it (ExpectNoRaces) and leaves its text on stderr.
extern "C" {
__attribute__((disable_sanitizer_instrumentation)) void __tsan_on_report(void*) {
    ++num_reports;
}
__attribute__((disable_sanitizer_instrumentation)) const char* __tsan_default_options() {
    return "suppress_equal_stacks=0:suppress_equal_addresses=0:exitcode=0";
}
}

__attribute__((disable_sanitizer_instrumentation)) int num_races() {
    return num_reports;
}

#else

int num_races() {
    return 0;
}

#endif
