#include "fiber.h"

#include <cstdint>
#include <cstdlib>

namespace cuda_host {
namespace {

Fiber* running;
[[maybe_unused]] void const* schedulerStack;
[[maybe_unused]] size_t schedulerSize;

}  // namespace
}  // namespace cuda_host

#if defined(__x86_64__)
// Saves what a called function must keep, and goes on where `to` had been left. ucontext would make system calls.
extern "C" void tokpruneSwitch(void** from, void* to);
asm(R"(
.text
.type tokpruneSwitch, @function
tokpruneSwitch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
static void* scheduler;
#else
static ucontext_t scheduler;
#endif

namespace cuda_host {

void Fiber::start(void (*main)()) {
    if (!stack_) stack_ = std::unique_ptr<unsigned char[]>(new unsigned char[kStack]);
    main_ = main;
    fake_ = nullptr;
#if defined(__x86_64__)
    auto const top = (reinterpret_cast<uintptr_t>(stack_.get()) + kStack) & ~uintptr_t{15};
    auto* const words = reinterpret_cast<uintptr_t*>(top) - 8;
    // Behind six registers: where `ret` goes, on a stack as after a call.
    words[6] = reinterpret_cast<uintptr_t>(&Fiber::enter);
    words[7] = 0;
    pointer_ = words;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_.get();
    context_.uc_stack.ss_size = kStack;
    makecontext(&context_, &Fiber::enter, 0);
#endif
}

void Fiber::resume() {
    running = this;
#if defined(__SANITIZE_ADDRESS__)
    void* fake;
    __sanitizer_start_switch_fiber(&fake, stack_.get(), kStack);
#endif
#if defined(__x86_64__)
    tokpruneSwitch(&scheduler, pointer_);
#else
    swapcontext(&scheduler, &context_);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void Fiber::leave() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&fake_, schedulerStack, schedulerSize);
#endif
#if defined(__x86_64__)
    tokpruneSwitch(&pointer_, scheduler);
#else
    swapcontext(&context_, &scheduler);
#endif
    arrived();
}

void Fiber::arrived() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_, &schedulerStack, &schedulerSize);
#endif
}

void Fiber::enter() {
    running->arrived();
    running->main_();
    running->leave();
    std::abort();  // an ended fiber is not resumed
}

}  // namespace cuda_host
