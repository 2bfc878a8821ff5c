// Compiled without sanitizers: it changes stacks beneath them.
#include "cuda_on_cpu.h"

#include <sys/mman.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

// Only where the program is linked with AddressSanitizer.
extern "C" __attribute__((weak)) void __asan_poison_memory_region(const volatile void*, size_t);
extern "C" __attribute__((weak)) void __asan_unpoison_memory_region(const volatile void*, size_t);

// Stores the callee-saved registers of System V on the stack, the stack's pointer at *from, and continues where `to` was stored.
extern "C" void emulation_switch(void** from, void* to);
__asm__(R"(
.text
.globl emulation_switch
.type emulation_switch, @function
emulation_switch:
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
.size emulation_switch, . - emulation_switch
)");

namespace emulation {

uint3 thread_index, block_index;
bool falling = false;

namespace {

constexpr int kLanes = 32, kMostThreads = 1024;
constexpr size_t kStackBytes = 64 << 10;

enum class State { kRunnable, kAtBarrier, kInShuffle, kDone };

struct Thread {
  void* stack_pointer;
  State state;
  int line;
  int64_t barriers, shuffles;
  unsigned mask;
  int offset;
  float value;
};

Thread threads[kMostThreads];
int count = 0, current = 0;
void* scheduler = nullptr;
void (*kernel_body)(const void*) = nullptr;
const void* kernel_argument = nullptr;

[[noreturn]] void fault(const char* what) {
  std::fprintf(stderr, "EMULATION FAULT: %s, block %u,%u, thread %d, line %d\n", what, block_index.x, block_index.y, current,
               threads[current].line);
  std::abort();
}

void wait(State state) {
  Thread& self = threads[current];
  self.state = state;
  emulation_switch(&self.stack_pointer, scheduler);
}

[[noreturn]] void first_function() {
  kernel_body(kernel_argument);
  wait(State::kDone);
  std::abort();
}

char* stack_of(int thread) {
  static char* const stacks = [] {
    void* memory = mmap(nullptr, kStackBytes * kMostThreads, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    return static_cast<char*>(memory);
  }();
  return stacks + static_cast<size_t>(thread) * kStackBytes;
}

void start(int index) {
  Thread& thread = threads[index];
  void** top = reinterpret_cast<void**>(stack_of(index) + kStackBytes);
  *--top = nullptr;  // where a caller's return address would be: functions expect the stack 8 bytes beside a multiple of 16
  *--top = reinterpret_cast<void*>(&first_function);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  thread = {top, State::kRunnable, 0, 0, 0, 0, 0, 0.0f};
}

void resume(int index) {
  current = index;
  thread_index = {static_cast<unsigned>(index), 0, 0};
  emulation_switch(&scheduler, threads[index].stack_pointer);
}

// False where no lane is in a shuffle.
bool shuffle(int first) {
  int waiting = 0;
  for (int i = 0; i < kLanes; ++i) waiting += threads[first + i].state == State::kInShuffle;
  if (waiting == 0) return false;
  float received[kLanes];
  const Thread& lead = threads[first];
  for (int i = 0; i < kLanes; ++i) {
    const Thread& thread = threads[first + i];
    current = first + i;
    if (waiting != kLanes) fault("a shuffle that not all lanes of the warp reach");
    if (thread.mask != 0xffffffffu) fault("a shuffle without a full mask");
    if (thread.line != lead.line || thread.shuffles != lead.shuffles || thread.offset != lead.offset) fault("a warp in different shuffles");
    received[i] = i + thread.offset < kLanes ? threads[first + i + thread.offset].value : thread.value;
  }
  for (int i = 0; i < kLanes; ++i) {
    threads[first + i].value = received[i];
    threads[first + i].state = State::kRunnable;
  }
  return true;
}

void run_warp(int first) {
  do {
    for (int i = 0; i < kLanes; ++i) {
      const int index = first + (falling ? kLanes - 1 - i : i);
      if (threads[index].state == State::kRunnable) resume(index);
    }
  } while (shuffle(first));
}

// False where every thread has ended.
bool pass_barrier() {
  int done = 0;
  for (int i = 0; i < count; ++i) done += threads[i].state == State::kDone;
  if (done == count) return false;
  for (int i = 0; i < count; ++i) {
    current = i;
    if (done != 0) fault("a barrier that some threads of the block never reach");
    if (threads[i].line != threads[0].line || threads[i].barriers != threads[0].barriers) fault("threads in different barriers");
    threads[i].state = State::kRunnable;
  }
  return true;
}

void run_block() {
  for (int i = 0; i < count; ++i) start(i);
  do {
    for (int first = 0; first < count; first += kLanes) run_warp(falling ? count - kLanes - first : first);
  } while (pass_barrier());
}

void fill_shared(Arena arena, size_t bytes) {
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(arena.values, kSharedBytes);
  for (size_t i = 0; i < kSharedBytes / sizeof(float); ++i) arena.values[i] = std::nanf("");
  if (__asan_poison_memory_region) __asan_poison_memory_region(reinterpret_cast<char*>(arena.values) + bytes, kSharedBytes - bytes);
}

}  // namespace

void barrier(int line) {
  Thread& self = threads[current];
  self.line = line;
  ++self.barriers;
  wait(State::kAtBarrier);
}

float shuffle_down(unsigned mask, float value, int offset, int line) {
  Thread& self = threads[current];
  self.line = line;
  self.value = value;
  self.mask = mask;
  self.offset = offset;
  ++self.shuffles;
  wait(State::kInShuffle);
  return self.value;
}

cudaError_t run_grid(dim3 grid, dim3 block, size_t shared_bytes, Arena arena, void (*body)(const void*), const void* argument) {
  const bool fits = grid.x >= 1 && grid.x <= 0x7fffffffu && grid.y >= 1 && grid.y <= 0xffffu && grid.z == 1 && block.x % kLanes == 0 &&
                    block.x >= 1 && block.x <= kMostThreads && block.y == 1 && block.z == 1 && shared_bytes <= kSharedBytes;
  if (!fits) return cudaErrorInvalidConfiguration;
  count = static_cast<int>(block.x);
  kernel_body = body;
  kernel_argument = argument;
  for (block_index.y = 0; block_index.y < grid.y; ++block_index.y) {
    for (block_index.x = 0; block_index.x < grid.x; ++block_index.x) {
      if (shared_bytes != 0) fill_shared(arena, shared_bytes);
      run_block();
    }
  }
  return cudaSuccess;
}

}  // namespace emulation
