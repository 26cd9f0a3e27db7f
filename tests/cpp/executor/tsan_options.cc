// Planted faults are counted: the same race in another test must be reported again, and nobody reads the
// reports. Some tests fork while other tests' threads exist.
#if defined(EP_SIMT_TSAN)
extern "C" __attribute__((disable_sanitizer_instrumentation)) const char* __tsan_default_options() {
    return "suppress_equal_stacks=0:suppress_equal_addresses=0:symbolize=0:die_after_fork=0";
}
#endif
