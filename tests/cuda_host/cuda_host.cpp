// The scheduler of cuda_host.h's fibers, shared memory, asynchronous copies.

#include "cuda_host.h"

#include <memory>
#include <numeric>
#include <random>
#include <unordered_map>
#include <vector>

#include "fiber.h"

namespace cuda_host {
namespace {

constexpr size_t kSharedByDefault = 48 << 10, kSharedLimit = 99 << 10;
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kGuard = 0;
#else
constexpr size_t kGuard = 4096;
#endif
constexpr unsigned kMostThreads = 1024, kGridLimit = 65535;
constexpr unsigned char kPoison = 0xff, kGuardByte = 0xa5;  // the first makes NaNs, whatever the type

enum class State { kReady, kAtBarrier, kInWarp, kDone };

struct Copy {
    unsigned char* target;
    unsigned char const* source;  // null: zeros
};

struct Thread {
    Fiber fiber;
    State state = State::kReady;
    char const* file = nullptr;
    int line = 0;
    std::vector<std::vector<Copy>> groups{{}};  // the last is still open
};

struct Warp {
    int arrived = 0;
    char const* file = nullptr;
    int line = 0;
    void* posts[kWarp];
};

struct Failure {};

std::vector<std::unique_ptr<Thread>> threads;  // kept from launch to launch, for their stacks
std::vector<Warp> warps;
// Exactly what was asked for, so that a sanitizer sees one byte more; without one, guards behind it.
std::unique_ptr<unsigned char[]> shared;
std::function<void()> const* body;
std::unordered_map<void const*, int> sharedAttributes;
int current;
unsigned order;
std::string error;
bool failed;

std::string place(char const* file, int line) {
    return std::string(file).substr(std::string(file).rfind('/') + 1) + ":" + std::to_string(line);
}

std::vector<unsigned> ordered(unsigned count) {
    std::vector<unsigned> indices(count);
    std::iota(indices.begin(), indices.end(), 0u);
    if (order == 1) std::reverse(indices.begin(), indices.end());
    if (order > 1) std::shuffle(indices.begin(), indices.end(), std::mt19937(order));
    return indices;
}

void leave(State state, char const* file, int line) {
    Thread& thread = *threads[current];
    thread.state = state;
    thread.file = file;
    thread.line = line;
    thread.fiber.leave();
}

void threadMain() {
    (*body)();
    for (auto const& group : threads[current]->groups)
        if (!group.empty()) fail("a thread ends before its asynchronous copies");
    threads[current]->state = State::kDone;
}

// Runs one block of `count` threads.
void runBlock(unsigned count, std::vector<unsigned> const& turns) {
    for (unsigned i = 0; i < count; ++i) {
        Thread& thread = *threads[i];
        thread.state = State::kReady;
        thread.groups.assign(1, {});
        thread.fiber.start(threadMain);
    }
    warps.assign(count / kWarp, Warp{});
    for (;;) {
        bool ran = false;
        for (unsigned i : turns) {
            Thread& thread = *threads[i];
            if (thread.state != State::kReady) continue;
            ran = true;
            current = static_cast<int>(i);
            threadIdx = dim3(i, 0, 0);
            thread.fiber.resume();
            if (failed) throw Failure{};
        }
        unsigned done = 0, waiting = 0;
        Thread* first = nullptr;
        for (unsigned i = 0; i < count; ++i) {
            Thread& thread = *threads[i];
            done += thread.state == State::kDone;
            if (thread.state != State::kAtBarrier) continue;
            ++waiting;
            if (!first) first = &thread;
            if (thread.line != first->line || thread.file != first->file) {
                error = "threads of a block wait at different barriers: " + place(first->file, first->line) + " and " +
                        place(thread.file, thread.line);
                throw Failure{};
            }
        }
        if (done == count) return;
        if (waiting == count) {
            for (unsigned i = 0; i < count; ++i) threads[i]->state = State::kReady;
        } else if (!ran) {
            error = "threads of a block wait for ever:";
            for (unsigned i = 0; i < count; ++i) {
                Thread const& thread = *threads[i];
                std::string const where = " is at " + place(thread.file, thread.line);
                error += " " + std::to_string(i) + (thread.state == State::kDone ? " has ended" : where) + ";";
                if (i > 0 && error.size() > 400) break;
            }
            throw Failure{};
        }
    }
}

}  // namespace

unsigned char* sharedMemory() {
    return shared.get();
}

void fail(std::string const& why) {
    error = why;
    failed = true;
    threads[current]->fiber.leave();
    std::abort();  // never resumed
}

void blockBarrier(char const* file, int line) {
    leave(State::kAtBarrier, file, line);
}

void warpMeeting(char const* file, int line, void* mine, void (*operation)(void* const* posts)) {
    int const first = current / kWarp * kWarp;
    Warp& warp = warps[current / kWarp];
    if (warp.arrived == 0) {
        warp.file = file;
        warp.line = line;
    } else if (warp.file != file || warp.line != line) {
        fail("lanes of a warp meet at different operations: " + place(warp.file, warp.line) + " and " +
             place(file, line));
    }
    warp.posts[current - first] = mine;
    if (++warp.arrived < kWarp) return leave(State::kInWarp, file, line);
    operation(warp.posts);
    warp.arrived = 0;
    for (int lane = 0; lane < kWarp; ++lane) threads[first + lane]->state = State::kReady;
}

void copyAsync(void* target, void const* source, bool valid) {
    auto const ends = reinterpret_cast<uintptr_t>(target) | reinterpret_cast<uintptr_t>(source);
    if (ends % 16) fail("an asynchronous copy from or to an address that is no multiple of 16");
    auto* const to = static_cast<unsigned char*>(target);
    std::memset(to, kPoison, 16);
    threads[current]->groups.back().push_back({to, valid ? static_cast<unsigned char const*>(source) : nullptr});
}

void copyCommit() {
    threads[current]->groups.emplace_back();
}

void copyWaitFor(int pending) {
    auto& groups = threads[current]->groups;
    while (static_cast<int>(groups.size()) - 1 > pending) {
        for (Copy const& copy : groups.front()) {
            if (copy.source) std::memcpy(copy.target, copy.source, 16);
            else std::memset(copy.target, 0, 16);
        }
        groups.erase(groups.begin());
    }
}

cudaError_t runGrid(void const* kernel, dim3 grid, int count, size_t bytes, std::function<void()> const& call) {
    auto const asked = sharedAttributes.find(kernel);
    size_t const allowed = asked == sharedAttributes.end() ? kSharedByDefault : static_cast<size_t>(asked->second);
    error.clear();
    if (bytes > allowed || bytes > kSharedLimit)
        error = std::to_string(bytes) + " bytes of shared memory are more than the kernel may have";
    if (count < 1 || count % kWarp || count > static_cast<int>(kMostThreads))
        error = std::to_string(count) + " threads make no block";
    if (!grid.x || !grid.y || !grid.z || grid.y > kGridLimit || grid.z > kGridLimit) error = "a grid out of bounds";
    if (!error.empty()) return cudaErrorInvalidConfiguration;
    while (threads.size() < static_cast<size_t>(count)) threads.push_back(std::make_unique<Thread>());
    // Aligned as on a GPU: new[] gives 16 bytes at least.
    shared.reset(new unsigned char[bytes + kGuard]);
    body = &call;
    gridDim = grid;
    blockDim = dim3(static_cast<unsigned>(count));
    failed = false;
    std::vector<unsigned> const turns = ordered(static_cast<unsigned>(count));
    try {
        for (unsigned z : ordered(grid.z))
            for (unsigned y : ordered(grid.y))
                for (unsigned x : ordered(grid.x)) {
                    blockIdx = dim3(x, y, z);
                    std::memset(shared.get(), kPoison, bytes);
                    std::memset(shared.get() + bytes, kGuardByte, kGuard);
                    runBlock(static_cast<unsigned>(count), turns);
                    for (size_t i = 0; i < kGuard; ++i) {
                        if (shared[bytes + i] == kGuardByte) continue;
                        error = "a block writes behind its shared memory";
                        throw Failure{};
                    }
                }
    } catch (Failure const&) {
        threads.clear();  // abandoned stacks are not used again
        return cudaErrorLaunchFailure;
    }
    return cudaSuccess;
}

void setOrder(unsigned value) {
    order = value;
}

char const* lastError() {
    return error.c_str();
}

}  // namespace cuda_host

cudaError_t cudaFuncSetAttribute(void const* kernel, cudaFuncAttribute, int value) {
    cuda_host::sharedAttributes[kernel] = value;
    return cudaSuccess;
}
