// One stackful context and the switch between two of them: Boost.Context's fcontext (about 5 ns), or ucontext (about
// 160 ns) when built with EP_SIMT_UCONTEXT. Sanitizers are told of every switch; the sources of the executor are
// themselves never instrumented by ThreadSanitizer.
#pragma once

#include <cstddef>

#if defined(EP_SIMT_UCONTEXT)
#include <ucontext.h>
#else
#include <boost/context/detail/fcontext.hpp>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define EP_SIMT_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EP_SIMT_ASAN 1
#endif
#endif

#if defined(EP_SIMT_ASAN)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(EP_SIMT_TSAN)
#include <sanitizer/tsan_interface.h>
#endif

namespace deep_ep::simt {

class Context {
public:
    using Entry = void (*)();  // must end with a switch to another context, never return

    // `top` is 16-byte aligned; the usable stack is [low, top).
    void create(char* low, char* top, Entry entry);

    // Saves the running context in `from` and continues `to`; returns when something switches back to `from`.
    static void switch_to(Context& from, Context& to);

    void* tsan_fiber = nullptr;  // see happens_before.h; owned by whoever owns this context

private:
#if defined(EP_SIMT_UCONTEXT)
    ucontext_t context_;
#else
    struct Jump {
        Context* from;
        Context* to;
    };
    static void enter(boost::context::detail::transfer_t transfer);
    boost::context::detail::fcontext_t context_ = nullptr;
#endif
    Entry entry_ = nullptr;
#if defined(EP_SIMT_ASAN)
    void start_asan_switch(Context& to);
    void finish_asan_switch();
    const void* stack_low_ = nullptr;  // of a thread's own stack: learned when it is first left
    size_t stack_bytes_ = 0;
    void* fake_stack_ = nullptr;
    static thread_local Context* left_;
#endif
};

#if !defined(EP_SIMT_UCONTEXT)
inline void Context::switch_to(Context& from, Context& to) {
#if defined(EP_SIMT_ASAN)
    from.start_asan_switch(to);
#endif
#if defined(EP_SIMT_TSAN)
    __tsan_switch_to_fiber(to.tsan_fiber, __tsan_switch_to_fiber_no_sync);
#endif
    Jump jump{&from, &to};
    const auto transfer = boost::context::detail::jump_fcontext(to.context_, &jump);
    static_cast<Jump*>(transfer.data)->from->context_ = transfer.fctx;
#if defined(EP_SIMT_ASAN)
    from.finish_asan_switch();
#endif
}
#endif

}  // namespace deep_ep::simt
