// Blocks of CUDA threads on the CPU. Blocks are shared out among OpenMP threads; in a block every CUDA thread is a
// fiber with its own stack. A warp runs lane after lane to its next collective (__syncwarp, shuffle, mma, ldmatrix,
// movmatrix), which is done once for the warp, and a block runs warp after warp to __syncthreads.
//
// All threads must come to the same line of source: a divergent barrier, or a thread that leaves while others wait,
// ends the process with a message. Shared memory, and a guard on each side of it, is NaN before every block; a guard
// that has changed after it ends the process too.
#pragma once

#include <omp.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <tuple>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

// Hidden, or libraries loaded side by side would share one state.
#define EMULATOR_HIDDEN __attribute__((visibility("hidden")))
#define EMULATOR_EXPORT __attribute__((used, visibility("default")))

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline thread_local EMULATOR_HIDDEN uint3 threadIdx, blockIdx;
inline thread_local EMULATOR_HIDDEN dim3 blockDim, gridDim;

namespace emulator EMULATOR_HIDDEN {

constexpr int THREADS = 1024, WARP = 32;
constexpr size_t STACK = 256 << 10, GUARD = 512, LINE = 64;

// Where in the source a thread waits: the default argument is evaluated at the call.
struct Site {
  const char *file;
  int line;
  static Site here(const char *file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

enum Order { FORWARD, REVERSE, RANDOM };
inline int order = FORWARD, workers = 0;
inline uint64_t seed = 0;

struct Random {  // SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)
  uint64_t state;
  uint64_t next() {
    uint64_t z = state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
  }
  int64_t below(int64_t n) { return next() % n; }

  template <class T>
  void arrange(T *items, int64_t n) {
    if (order == REVERSE) std::reverse(items, items + n);
    for (int64_t i = n - 1; order == RANDOM && i > 0; i--) std::swap(items[i], items[below(i + 1)]);
  }
};

struct Copy {
  void *to;
  const void *from;  // null: zeros
  int group;
  void perform() const { from ? std::memcpy(to, from, 16) : std::memset(to, 0, 16); }
};

struct Thread;
using Collective = void (*)(Thread *lanes, int count);
enum State { IN_WARP, IN_BLOCK, LEFT };

struct Thread {
#if defined(__x86_64__)
  void *stack_pointer;
#else
  ucontext_t context;
#endif
  char *stack = nullptr;
  uint3 index;
  State state;
  const char *what;
  Site site;
  Collective collective;
  void *operands;
  std::vector<Copy> copies;
  int groups;
};

struct Launch {
  const char *kernel;
  dim3 grid, block;
  size_t shared_bytes;
  void (*body)(const void *);
  const void *arguments;
};

// What an OpenMP thread needs to run blocks, kept from launch to launch.
struct Worker {
  const Launch *launch;
  std::unique_ptr<Thread[]> threads{new Thread[THREADS]};
  int count;
  Thread scheduler, *current, **next, *queue[WARP + 1];
  std::vector<char> memory;
  char *shared;
  Random random;

  ~Worker() {
    for (int i = 0; i < THREADS; i++)
      if (threads[i].stack) munmap(threads[i].stack, STACK);
  }
  int lane() const { return (current - threads.get()) % WARP; }
};
inline thread_local Worker *self;

[[noreturn]] inline void fail(const Thread &thread, const char *text) {
  std::fprintf(stderr, "emulator: kernel %s, block (%u, %u, %u), thread (%u, %u, %u): %s\n", self->launch->kernel,
               blockIdx.x, blockIdx.y, blockIdx.z, thread.index.x, thread.index.y, thread.index.z, text);
  std::abort();
}

[[noreturn]] inline void fail(const Thread &thread, const char *what, Site site, const char *text) {
  char message[500];
  std::snprintf(message, sizeof message, "%s at %s:%d %s", what, site.file, site.line, text);
  fail(thread, message);
}

#if defined(__x86_64__)
// noipa: what runs before the return clobbers more registers than the compiler can see.
__attribute__((naked, noipa)) inline void swap_stacks(void **, void *) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n"
      "popq %rcx\n jmpq *%rcx\n");
}
inline void swap(Thread &from, Thread &to) { swap_stacks(&from.stack_pointer, to.stack_pointer); }
inline void start(Thread &thread, size_t size, void (*entry)()) {
  void **top = reinterpret_cast<void **>(thread.stack + size) - 8;  // six registers, the entry, its return address
  top[6] = reinterpret_cast<void *>(entry);
  thread.stack_pointer = top;
}
#else
inline void swap(Thread &from, Thread &to) { swapcontext(&from.context, &to.context); }
inline void start(Thread &thread, size_t size, void (*entry)()) {
  getcontext(&thread.context);
  thread.context.uc_stack.ss_sp = thread.stack;
  thread.context.uc_stack.ss_size = size;
  makecontext(&thread.context, entry, 0);
}
#endif

// To the next thread of the queue; the scheduler is its last.
inline void yield() {
  Thread &from = *self->current, &to = **self->next++;
  self->current = &to;
  threadIdx = to.index;
  swap(from, to);
}

// A fiber serves one thread of every block to come.
inline void fiber() {
  for (;;) {
    self->launch->body(self->launch->arguments);
    self->current->state = LEFT;
    yield();
  }
}

inline void wait(State state, const char *what, Site site, Collective collective = nullptr, void *operands = nullptr) {
  Thread &thread = *self->current;
  thread.state = state;
  thread.what = what;
  thread.site = site;
  thread.collective = collective;
  thread.operands = operands;
  yield();
}

inline bool together(const Thread &a, const Thread &b) {
  if (a.state != b.state || a.state == LEFT) return a.state == b.state;
  if (a.what != b.what || a.site.line != b.site.line) return false;
  return a.site.file == b.site.file || !std::strcmp(a.site.file, b.site.file);
}

inline void require_together(Thread *threads, int count) {
  for (int i = 1; i < count; i++) {
    if (together(threads[0], threads[i])) continue;
    Thread *waiting = &threads[0], *other = &threads[i];
    if (waiting->state == LEFT) std::swap(waiting, other);
    char where[250] = "has left the kernel", message[500];
    if (other->state != LEFT)
      std::snprintf(where, sizeof where, "waits in %s at %s:%d", other->what, other->site.file, other->site.line);
    std::snprintf(message, sizeof message, "waits in %s at %s:%d, but thread (%u, %u, %u) %s", waiting->what,
                  waiting->site.file, waiting->site.line, other->index.x, other->index.y, other->index.z, where);
    fail(*waiting, message);
  }
}

// Runs a warp to its next collective, or, and then returns false, to a barrier of the block or the end.
inline bool step(Worker &worker, int warp) {
  Thread *lanes = &worker.threads[warp * WARP];
  const int count = std::min(WARP, worker.count - warp * WARP);
  for (int i = 0; i < count; i++) worker.queue[i] = &lanes[i];
  worker.random.arrange(worker.queue, count);
  worker.queue[count] = worker.current = &worker.scheduler;
  worker.next = worker.queue;
  yield();
  if (std::none_of(lanes, lanes + count, [](const Thread &lane) { return lane.state == IN_WARP; })) return false;
  require_together(lanes, count);
  if (lanes[0].collective) lanes[0].collective(lanes, count);
  return true;
}

inline void give_stack(Thread &thread, int number) {
  void *stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stack == MAP_FAILED) fail(thread, "there is no memory for its stack");
  mprotect(stack, 1, PROT_NONE);
  thread.stack = static_cast<char *>(stack);
  start(thread, STACK - number % WARP * 2 * LINE, fiber);  // or all lanes would share the same lines of the cache
}

inline void prepare(Worker &worker) {
  const Launch &launch = *worker.launch;
  worker.count = 0;
  for (unsigned z = 0; z < launch.block.z; z++)
    for (unsigned y = 0; y < launch.block.y; y++)
      for (unsigned x = 0; x < launch.block.x; x++) {
        Thread &thread = worker.threads[worker.count++];
        thread.index = {x, y, z};
        thread.copies.clear();
        thread.groups = 0;
        if (!thread.stack) give_stack(thread, worker.count);
      }
  worker.memory.assign(GUARD + launch.shared_bytes + GUARD + LINE, char(0xff));
  worker.shared = worker.memory.data() + GUARD + LINE - reinterpret_cast<uintptr_t>(worker.memory.data()) % LINE;
}

inline void run_block(Worker &worker) {
  prepare(worker);
  Thread *threads = worker.threads.get();
  int turns[THREADS / WARP];
  const int warps = (worker.count + WARP - 1) / WARP;
  do {
    std::iota(turns, turns + warps, 0);
    worker.random.arrange(turns, warps);
    for (int i = 0; i < warps;) {
      if (order == RANDOM) std::swap(turns[i], turns[i + worker.random.below(warps - i)]);
      if (!step(worker, turns[i])) i++;
    }
    require_together(threads, worker.count);
  } while (threads[0].state != LEFT);
  const char *end = worker.shared + worker.launch->shared_bytes;
  const auto kept = [](const char *guard) {
    return std::all_of(guard, guard + GUARD, [](char byte) { return byte == char(0xff); });
  };
  if (!kept(worker.shared - GUARD) || !kept(end)) fail(threads[0], "its block wrote outside the shared memory");
}

inline int run(const Launch &launch) {
  const dim3 grid = launch.grid, block = launch.block;
  const int64_t blocks = int64_t(grid.x) * grid.y * grid.z, threads = int64_t(block.x) * block.y * block.z;
  if (blocks == 0) return 0;
  if (threads == 0 || threads > THREADS || grid.y > 65535 || grid.z > 65535) return 9;  // cudaErrorInvalidConfiguration
  if (launch.shared_bytes > 227 << 10) return 1;                                        // cudaErrorInvalidValue
  std::vector<int64_t> turns(blocks);
  std::iota(turns.begin(), turns.end(), 0);
  Random{seed}.arrange(turns.data(), blocks);
  const int64_t limit = workers > 0 ? workers : omp_get_max_threads();
#pragma omp parallel for schedule(dynamic) num_threads(std::min(limit, blocks))
  for (int64_t i = 0; i < blocks; i++) {
    static thread_local Worker worker;
    const int64_t number = turns[i];
    self = &worker;
    worker.launch = &launch;
    worker.random.state = seed ^ Random{uint64_t(number)}.next();
    blockIdx = {unsigned(number % grid.x), unsigned(number / grid.x % grid.y), unsigned(number / grid.x / grid.y)};
    blockDim = block;
    gridDim = grid;
    run_block(worker);
  }
  return 0;
}

template <class... Parameters, class... Arguments>
int launch(const char *name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void *,
           Arguments... arguments) {
  using Call = std::tuple<void (*)(Parameters...), Parameters...>;
  const Call call(kernel, static_cast<Parameters>(arguments)...);
  const auto body = [](const void *call) {
    std::apply([](auto kernel, auto... values) { kernel(values...); }, *static_cast<const Call *>(call));
  };
  return run({name, grid, block, shared_bytes, body, &call});
}

}  // namespace emulator

// The order in which threads, warps and blocks run: 0 forward, 1 reverse, 2 random.
extern "C" EMULATOR_EXPORT inline void emulator_order(int order, uint64_t seed) {
  emulator::order = order;
  emulator::seed = seed;
}

// The number of OpenMP threads; 0: OpenMP's own.
extern "C" EMULATOR_EXPORT inline void emulator_threads(int count) { emulator::workers = count; }
