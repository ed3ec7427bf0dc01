// A fiber: a function with a stack of its own, which runs from resume() to leave() or to its end.
#pragma once

#include <cstddef>
#include <memory>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace cuda_host {

class Fiber {
  public:
    // Makes the next resume() call `main` afresh, whatever ran here before.
    void start(void (*main)());
    void resume();  // by the scheduler
    void leave();   // by the fiber

  private:
    static void enter();
    void arrived();

    static constexpr size_t kStack = 256 << 10;
    std::unique_ptr<unsigned char[]> stack_;
    void (*main_)() = nullptr;
    void* fake_ = nullptr;  // the sanitizer's
#if defined(__x86_64__)
    void* pointer_ = nullptr;  // its stack pointer while it does not run
#else
    ucontext_t context_;
#endif
};

}  // namespace cuda_host
