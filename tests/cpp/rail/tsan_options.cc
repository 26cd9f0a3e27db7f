// ThreadSanitizer takes the bytes that a system call sends for read when the call has returned. By then a kernel may have
// been told that the peer has them, and writes the next ones: no race, the system has its copy.
#if defined(EP_SIMT_TSAN)
extern "C" __attribute__((disable_sanitizer_instrumentation)) const char* __tsan_default_options() {
    return "intercept_send=0:die_after_fork=0";
}
#endif
