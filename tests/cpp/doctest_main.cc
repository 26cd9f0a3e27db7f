#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include <cstdio>

#include "races.h"

namespace {
int num_reports = 0;
int num_expected = 0;
}  // namespace

#if defined(EP_SIMT_TSAN)
#include <sanitizer/common_interface_defs.h>

// ThreadSanitizer calls these two. Tests of planted faults count reports, hence none is suppressed as a repetition, and
// the exit status is decided below.
extern "C" {
__attribute__((disable_sanitizer_instrumentation)) void __tsan_on_report(void*) { ++num_reports; }
__attribute__((disable_sanitizer_instrumentation)) const char* __tsan_default_options() {
    return "suppress_equal_stacks=0:suppress_equal_addresses=0:exitcode=0";
}
}

// Reports are given names by another process. It has to be started before this one is too large to fork.
static void start_symbolizer() {
    char text[256];
    __sanitizer_symbolize_pc(reinterpret_cast<void*>(&num_races), "%f", text, sizeof(text));
}
#else
static void start_symbolizer() {}
#endif

__attribute__((noinline)) int num_races() { return num_reports; }
void expect_races(int count) { num_expected += count; }

int main(int argc, char** argv) {
    start_symbolizer();
    doctest::Context context(argc, argv);
    const int status = context.run();
    if (num_races() == num_expected) return status;
    std::fprintf(stderr, "ThreadSanitizer reported %d data races that no test planted; their text is above\n",
                 num_races() - num_expected);
    return 1;
}
