#include "device/simt/context.h"

#include <cstdint>

namespace deep_ep::simt {

#if defined(EP_SIMT_ASAN)
thread_local Context* Context::left_ = nullptr;

void Context::start_asan_switch(Context& to) {
    left_ = this;
    __sanitizer_start_switch_fiber(&fake_stack_, to.stack_low_, to.stack_bytes_);
}

void Context::finish_asan_switch() {
    const void* low = nullptr;
    size_t bytes = 0;
    __sanitizer_finish_switch_fiber(fake_stack_, &low, &bytes);
    if (left_ != nullptr && left_->stack_low_ == nullptr) {
        left_->stack_low_ = low;
        left_->stack_bytes_ = bytes;
    }
}
#endif

#if defined(EP_SIMT_UCONTEXT)

namespace {
void enter_ucontext(unsigned high, unsigned low) {
    const uint64_t address = (static_cast<uint64_t>(high) << 32) | low;
    reinterpret_cast<void (*)()>(address)();
}
}  // namespace

void Context::create(char* low, char* top, Entry entry) {
    entry_ = entry;
    getcontext(&context_);
    context_.uc_stack.ss_sp = low;
    context_.uc_stack.ss_size = static_cast<size_t>(top - low);
    context_.uc_link = nullptr;
    const auto address = reinterpret_cast<uint64_t>(entry);
    makecontext(&context_, reinterpret_cast<void (*)()>(enter_ucontext), 2, static_cast<unsigned>(address >> 32),
                static_cast<unsigned>(address));
}

void Context::switch_to(Context& from, Context& to) {
#if defined(EP_SIMT_TSAN)
    __tsan_switch_to_fiber(to.tsan_fiber, __tsan_switch_to_fiber_no_sync);
#endif
    swapcontext(&from.context_, &to.context_);
}

#else

void Context::enter(boost::context::detail::transfer_t transfer) {
    const auto* jump = static_cast<Jump*>(transfer.data);
    jump->from->context_ = transfer.fctx;
#if defined(EP_SIMT_ASAN)
    jump->to->finish_asan_switch();
#endif
    jump->to->entry_();
    __builtin_unreachable();
}

void Context::create(char* low, char* top, Entry entry) {
    entry_ = entry;
    context_ = boost::context::detail::make_fcontext(top, static_cast<size_t>(top - low), enter);
#if defined(EP_SIMT_ASAN)
    stack_low_ = low;
    stack_bytes_ = static_cast<size_t>(top - low);
    fake_stack_ = nullptr;
#endif
}

#endif

}  // namespace deep_ep::simt
