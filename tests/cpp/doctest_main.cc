#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#if defined(EP_SIMT_TSAN)
#include <sanitizer/common_interface_defs.h>

// ThreadSanitizer asks another process for the names in a report. That one has to be started before this one has grown
// too large to fork.
[[maybe_unused]] static const bool is_symbolizer_started = [] {
    char text[256];
    __sanitizer_symbolize_pc(__builtin_return_address(0), "%f", text, sizeof(text));
    return true;
}();
#endif
