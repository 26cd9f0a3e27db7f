// A test forks while the watcher's thread exists, and the child starts one of its own.
#if defined(EP_SIMT_TSAN)
extern "C" __attribute__((disable_sanitizer_instrumentation)) const char* __tsan_default_options() {
    return "die_after_fork=0";
}
#endif
