// Runs a grid on the CPU: blocks spread over OS threads, and in each the block's CUDA threads as fibers that switch where
// a CUDA thread would have to wait. A launch is over when it returns. What a kernel does wrong ends the launch with
// cudaErrorLaunchFailure and a sentence in last_error().

#include "engine.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <fstream>
#include <iterator>
#include <memory>
#include <mutex>
#include <set>
#include <thread>
#include <tuple>
#include <vector>

#include "scheduler.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulation {

__thread Thread* here = nullptr;

namespace {

constexpr size_t kSharedMax = 227 * 1024;         // per block, where a kernel has asked for it
constexpr size_t kSharedUnasked = 48 * 1024;      // where it has not
constexpr size_t kArena = 512 * 1024;             // what variables and their guards are spread over
constexpr size_t kGuard = 64;                     // bytes around each shared variable that stay kPoison
constexpr size_t kPage = 4096;
#ifdef __SANITIZE_ADDRESS__
constexpr size_t kStack = 256 * 1024;
#else
constexpr size_t kStack = 64 * 1024;
#endif

std::mutex mutex;  // of all that follows, up to the blank line
Order order = FIFO;
uint64_t seed = 1;
std::string error;
std::atomic<bool> left_out{false};
std::atomic<int> major_capability{8};
std::map<const void*, int64_t> launched;
std::map<const void*, int> shared_asked;  // cudaFuncAttributeMaxDynamicSharedMemorySize

// An asynchronous copy to shared memory that has not been made yet.
struct Copy {
    void* to;
    const void* from;
    size_t read, bytes;
    int group;

    void make() const {
        memcpy(to, from, read);
        memset(static_cast<char*>(to) + read, 0, bytes - read);
    }
};

struct Fiber : Thread {
    void* sp;
    char* stack;  // its lowest byte
    int index, warp, lane;
    bool done;
    const char* waits_for;
    Place place;
    int64_t priority;
    uint64_t bits;  // what it brings to a warp function, and takes away
    int source;     // the lane it reads there
    std::deque<Copy> copies;
    int copy_group;  // that its next copy belongs to
    void *asan, *tsan;
};

// Lanes of one warp that have come to a warp function and wait for the rest of its mask.
struct Meeting {
    const char* name;
    Place place;
    uint32_t mask, arrived;
};

struct Warp {
    std::vector<Meeting> meetings;
    uint32_t exited;
};

#ifdef FASTATTN_RECORD
// One instruction of a warp: by its address and how often its lanes have come there.
struct Instruction {
    bool write;
    std::map<int, std::pair<uintptr_t, size_t>> accesses;  // address and bytes of each lane that takes part
};
#endif

struct Block {
    uint3 index;
    dim3 grid, dim;
    int threads, live;
    Order order;
    uint64_t random;
    int64_t lowest_priority;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::deque<Fiber*> runnable;
    std::vector<Fiber*> at_barrier;
    Place barrier_place;
    int barrier_generation;

    unsigned char* shared;  // fixed-size variables fill it from the top, the dynamic one from the bottom
    size_t shared_top, shared_dynamic_bytes;
    std::vector<SharedVariable> variables;

    std::vector<std::pair<Fiber*, std::function<bool()>>> waiting;  // each until it is told that this holds
    std::vector<std::function<void()>> work;
    std::unique_ptr<BlockState> state;

    Body body;
    const void* arguments;
    std::string failure;
    std::vector<char*> stacks;
    std::vector<void*> tsan;  // its fibers, by thread of a block: making one takes longer than most blocks
    void *main_sp, *main_asan, *main_tsan;
    const void* main_stack;
    size_t main_stack_bytes;

#ifdef FASTATTN_RECORD
    std::map<std::tuple<int, const void*, int>, Instruction> instructions;
    std::map<std::pair<int, const void*>, int> visits;  // of a thread to an instruction
    bool for_a_warp = false;                            // in what stands for an instruction, which moves between registers
#endif

    uint64_t draw() {
        random ^= random << 13;
        random ^= random >> 7;
        return random ^= random << 17;
    }
};

__thread Block* block __attribute__((tls_model("initial-exec"))) = nullptr;

Fiber* self() { return static_cast<Fiber*>(here); }

extern "C" void fastattn_emulation_switch(void** save, void* load);
#if defined(__x86_64__)
asm(R"(.text
.local fastattn_emulation_switch
.type fastattn_emulation_switch,@function
fastattn_emulation_switch:
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
constexpr int kReturnWord = 6, kFrameWords = 8;
#elif defined(__aarch64__)
asm(R"(.text
.local fastattn_emulation_switch
.type fastattn_emulation_switch,%function
fastattn_emulation_switch:
    sub sp, sp, #160
    stp x19, x20, [sp]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
)");
constexpr int kReturnWord = 11, kFrameWords = 20;
#else
#error "the emulation's switch between fibers is written for x86-64 and AArch64"
#endif

// Goes on with another fiber, or where run_block left off; for_good: this one is over.
void switch_to(Fiber* to, bool for_good = false) {
    Fiber* from = self();
    void** save = from ? &from->sp : &block->main_sp;
    here = to;
#ifdef __SANITIZE_ADDRESS__
    void** asan = from ? &from->asan : &block->main_asan;
    __sanitizer_start_switch_fiber(for_good ? nullptr : asan, to ? to->stack : block->main_stack,
                                   to ? kStack : block->main_stack_bytes);
#endif
#ifdef FASTATTN_TSAN
    __tsan_switch_to_fiber(to ? to->tsan : block->main_tsan, __tsan_switch_to_fiber_no_sync);
#endif
    fastattn_emulation_switch(save, to ? to->sp : block->main_sp);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(*asan, nullptr, nullptr);
#endif
    if (for_good) abort();
}

const char* base_name(const char* path) {
    const char* slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

[[noreturn]] void fail_with(const std::string& message) {
    block->failure = message;
    switch_to(nullptr, true);
    abort();
}

// Every thread waits for another: who waits where, by warp.
[[noreturn]] void deadlock() {
    std::map<std::string, int> waiting;
    for (const Fiber& f : block->fibers)
        if (!f.done) waiting[text("warp %d at %s (%s)", f.warp, f.waits_for, text(f.place).c_str())]++;
    std::string message = "deadlock:";
    for (const auto& [where, lanes] : waiting)
        if (message.size() < 400) message += text(" %d of %s;", lanes, where.c_str());
    if (block->threads != block->live) message += text(" %d threads have exited;", block->threads - block->live);
    if (block->state) message += block->state->waited_for();
    message.back() = ' ';
    fail_with(message);
}

// What hardware does by itself gets its turn: in REVERSE when nothing else can, the latest first, else at any time.
void let_work_go_on() {
    auto& work = block->work;
    while (!work.empty() && (block->runnable.empty() || (block->order >= RANDOM && block->draw() % 4 == 0))) {
        const auto chosen = work.begin() + (block->order == REVERSE ? work.size() - 1 : block->draw() % work.size());
        const auto doing = std::move(*chosen);
        work.erase(chosen);
        doing();
    }
}

Fiber* pick() {
    let_work_go_on();
    auto& runnable = block->runnable;
    if (runnable.empty()) return nullptr;
    auto chosen = runnable.begin();
    if (block->order == REVERSE) chosen = runnable.end() - 1;
    if (block->order == RANDOM) chosen += block->draw() % runnable.size();
    if (block->order == PCT)
        chosen = std::max_element(chosen, runnable.end(),
                                  [](const Fiber* a, const Fiber* b) { return a->priority < b->priority; });
    Fiber* fiber = *chosen;
    runnable.erase(chosen);
    return fiber;
}

// Until somebody puts this fiber among the runnable.
void wait(const char* name, Place place) {
    Fiber* me = self();
    me->waits_for = name;
    me->place = place;
    Fiber* next = pick();
    if (!next) deadlock();
    if (next != me) switch_to(next);
}

void let_others_go_first(const char* name, Place place) {
    if (block->order == FIFO) return;
    block->runnable.push_back(self());
    wait(name, place);
}

// A GPU may stop any thread anywhere for as long as it likes.
void perhaps_preempt(Place place) {
    if (block->order < RANDOM || block->draw() % (block->order == PCT ? 64 : 16)) return;
    self()->priority = --block->lowest_priority;
    let_others_go_first("preempted", place);
}

// The lanes of mask come together; the last to come does `finish` for all of them.
template <typename Finish>
void meet(const char* name, uint32_t mask, Place place, Finish finish) {
    Fiber* me = self();
    Warp& warp = block->warps[me->warp];
    const uint32_t bit = 1u << me->lane;
    if (!(mask & bit)) fail(place, "%s: lane %d calls it and is not in its mask %08x", name, me->lane, mask);
    if (mask & warp.exited) fail(place, "%s: its mask %08x names lanes that have exited", name, mask);
    auto& meetings = warp.meetings;
    auto meeting = std::find_if(meetings.begin(), meetings.end(), [&](const Meeting& m) { return m.mask & mask; });
    if (meeting == meetings.end()) meeting = meetings.insert(meetings.end(), Meeting{name, place, mask, 0});
    if (meeting->mask != mask || !(meeting->place == place) || meeting->name != name)
        fail(place, "%s with mask %08x meets %s with mask %08x at %s in one warp", name, mask, meeting->name,
             meeting->mask, text(meeting->place).c_str());
    meeting->arrived |= bit;
    if (meeting->arrived != mask) return wait(name, place);

    Fiber* lanes = &block->fibers[me->warp * 32];
    finish(lanes);
    meetings.erase(meeting);
    for (int lane = 0; lane < 32; lane++)
        if (mask >> lane & 1 && lane != me->lane) block->runnable.push_back(&lanes[lane]);
    let_others_go_first(name, place);
}

void check_guards(const std::string& when) {
#ifndef __SANITIZE_ADDRESS__
    for (const SharedVariable& v : block->variables)
        for (size_t i = 0; i < kGuard; i++) {
            const bool below = v.start[-1 - static_cast<int>(i)] != kPoison, above = v.start[v.bytes + i] != kPoison;
            if (below || above)
                fail_with(text("shared memory is written %zu bytes %s %s (%zu bytes), seen %s", i + below,
                               below ? "before the start of" : "past the end of", v.name, v.bytes, when.c_str()));
        }
#else
    (void)when;
#endif
}

void open_barrier_if_all_came() {
    if (block->at_barrier.empty() || static_cast<int>(block->at_barrier.size()) < block->live) return;
    check_guards("at the barrier of " + text(block->barrier_place));
    for (Fiber* f : block->at_barrier)
        if (f != self()) block->runnable.push_back(f);
    block->at_barrier.clear();
    block->barrier_generation++;
}

Fiber* next_after_me() {
    const Unseen unseen;
    Fiber* me = self();
    me->done = true;
    block->live--;
    Warp& warp = block->warps[me->warp];
    warp.exited |= 1u << me->lane;
    for (const Meeting& m : warp.meetings)
        if (m.mask >> me->lane & 1) fail(m.place, "%s waits for lane %d, which exits", m.name, me->lane);
    if (block->state) block->state->thread_exits(me->index);
    if (!block->live) {
        if (!block->work.empty()) fail(me->place, "the block ends while copies to its shared memory are under way");
        if (block->state) block->state->block_ends();
        check_guards("at the end");
    }
    open_barrier_if_all_came();
    Fiber* next = pick();
    if (block->live && !next) deadlock();
    return next;
}

void fiber_main() {
#ifdef __SANITIZE_ADDRESS__
    const bool first = !block->main_stack_bytes;  // entered from run_block, whose stack this tells
    __sanitizer_finish_switch_fiber(nullptr, first ? &block->main_stack : nullptr,
                                    first ? &block->main_stack_bytes : nullptr);
#endif
    acquire(block);
    block->body(block->arguments);
    release(block);
    switch_to(next_after_me(), true);
}

void prepare(Fiber& fiber) {
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(fiber.stack, kStack);
#endif
    auto* frame = reinterpret_cast<void**>(fiber.stack + kStack - 64) - kFrameWords;
    memset(frame, 0, kFrameWords * sizeof(void*));
    frame[kReturnWord] = reinterpret_cast<void*>(&fiber_main);
    fiber.sp = frame;
#ifdef FASTATTN_TSAN
    auto& known = block->tsan;
    while (static_cast<int>(known.size()) <= fiber.index) known.push_back(__tsan_create_fiber(0));
    fiber.tsan = known[fiber.index];
#endif
}

void poison_shared(bool poison) {
#ifdef __SANITIZE_ADDRESS__
    (poison ? __asan_poison_memory_region : __asan_unpoison_memory_region)(block->shared, kArena);
#else
    (void)poison;
#endif
}

unsigned char* make_shared(const void* key, const char* name, unsigned char* start, size_t bytes) {
    block->variables.push_back({key, name, start, bytes});
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(start, bytes);
    memset(start, kPoison, bytes);
#else
    memset(start - kGuard, kPoison, bytes + 2 * kGuard);
#endif
    return start;
}

void run_block(Block& b, int64_t index) {
    block = &b;
    b.index = uint3{static_cast<unsigned>(index % b.grid.x), static_cast<unsigned>(index / b.grid.x % b.grid.y),
                    static_cast<unsigned>(index / (int64_t{b.grid.x} * b.grid.y))};
    b.random = (seed + 1) * 0x9e3779b97f4a7c15u ^ (2 * index + 1);
    for (int i = 0; i < 8; i++) b.draw();
    b.live = b.threads;
    b.lowest_priority = b.barrier_generation = 0;
    b.runnable.clear();
    b.at_barrier.clear();
    b.variables.clear();
    b.waiting.clear();
    b.work.clear();
    b.state.reset();
    b.shared_top = kArena;
    b.main_stack_bytes = 0;
    b.warps.assign((b.threads + 31) / 32, Warp{});
    if (b.threads % 32) b.warps.back().exited = ~0u << b.threads % 32;
    poison_shared(true);
    int64_t priority = 0;  // lanes of a warp keep together, mostly
    for (int i = 0; i < b.threads; i++) {
        Fiber& f = b.fibers[i] = Fiber{};
        const unsigned n = i;
        f.thread = {n % b.dim.x, n / b.dim.x % b.dim.y, n / (b.dim.x * b.dim.y)};
        f.block = b.index;
        f.block_dim = b.dim;
        f.grid_dim = b.grid;
        f.stack = b.stacks[i];
        f.index = i;
        f.warp = i / 32;
        f.lane = i % 32;
        priority = f.lane ? priority + b.draw() % 64 - 32 : b.draw() >> 12;
        f.priority = priority;
        prepare(f);
        b.runnable.push_back(&f);
    }
#ifdef FASTATTN_TSAN
    b.main_tsan = __tsan_get_current_fiber();
#endif
    release(block);
    switch_to(pick());
    acquire(block);
    poison_shared(false);
    block = nullptr;
}

// Mapping stacks takes milliseconds: blocks are kept.
std::vector<std::unique_ptr<Block>> spare;

#ifdef FASTATTN_RECORD
struct Recorded : Traffic {
    std::set<uintptr_t> read, written;  // sectors
};
std::map<const void*, Recorded> recorded;  // by kernel; guarded by mutex

constexpr size_t kSector = 32, kBanks = 32, kWord = 4;

void record(const void* instruction, bool write, const void* address, size_t bytes) {
    if (!here || block->for_a_warp) return;
    const auto at = reinterpret_cast<uintptr_t>(address);
    const auto within = [&](const void* start, size_t size) { return at - reinterpret_cast<uintptr_t>(start) < size; };
    // registers, parameters, indices
    if (within(self()->stack, kStack) || within(block->arguments, kPage)) return;
    if (within(self(), sizeof(Fiber)) || within(&here, sizeof here)) return;
    for (size_t done = 0; done < bytes; done += 16) {
        const int visit = block->visits[{self()->index, instruction}]++;
        Instruction& i = block->instructions[{self()->warp, instruction, visit}];
        i.write = write;
        i.accesses[self()->lane] = {at + done, std::min<size_t>(16, bytes - done)};
    }
}

void add_up(Recorded& sum, const Block& b) {
    for (const auto& [_, i] : b.instructions) {
        const auto [start, width] = i.accesses.begin()->second;
        if (start - reinterpret_cast<uintptr_t>(b.shared) < kArena) {
            // as many lanes at a time as together ask for 128 bytes; words of one bank are served one after the other
            const int lanes = 128 / static_cast<int>(std::max(kWord, width));
            for (auto lane = i.accesses.begin(); lane != i.accesses.end();) {
                std::map<size_t, std::set<uintptr_t>> words;  // by bank
                for (const int turn = lane->first / lanes; lane != i.accesses.end() && lane->first / lanes == turn; lane++)
                    for (size_t w = 0; w < lane->second.second; w += kWord) {
                        const uintptr_t word = (lane->second.first + w) / kWord;
                        words[word % kBanks].insert(word);
                    }
                size_t most = 0;
                for (const auto& [bank, of_bank] : words) most = std::max(most, of_bank.size());
                sum.shared_passes++;
                sum.shared_conflicts += most - 1;
            }
            continue;
        }
        std::set<uintptr_t> sectors, distinct;
        for (const auto& [lane, access] : i.accesses) {
            const auto [at, size] = access;
            distinct.insert(at);
            for (uintptr_t s = at / kSector; s <= (at + size - 1) / kSector; s++) sectors.insert(s);
        }
        sum.sectors += sectors.size();
        sum.least_sectors += (distinct.size() * width + kSector - 1) / kSector;
        (i.write ? sum.written : sum.read).insert(sectors.begin(), sectors.end());
    }
}
#else
void record(const void*, bool, const void*, size_t) {}
#endif

std::unique_ptr<Block> take_block(int threads) {
    std::unique_ptr<Block> b;
    {
        std::lock_guard<std::mutex> lock(mutex);
        if (!spare.empty()) {
            b = std::move(spare.back());
            spare.pop_back();
        }
    }
    if (!b) {
        b = std::make_unique<Block>();
        b->shared = static_cast<unsigned char*>(aligned_alloc(kPage, kArena));
    }
    if (const int missing = threads - static_cast<int>(b->stacks.size()); missing > 0) {
        // under each stack a page that faults
        const size_t step = kStack + kPage;
        void* map = mmap(nullptr, step * missing, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                         -1, 0);
        if (map == MAP_FAILED) abort();
        for (int i = 0; i < missing; i++) {
            char* page = static_cast<char*>(map) + i * step;
            mprotect(page, kPage, PROT_NONE);
            b->stacks.push_back(page + kPage);
        }
    }
    b->threads = threads;
    b->fibers.resize(threads);
    return b;
}

int os_threads() {
    static const int count = [] {
        const char* asked = getenv("OMP_NUM_THREADS");
        return std::max(1, asked ? atoi(asked) : static_cast<int>(std::thread::hardware_concurrency()));
    }();
    return count;
}

// Kernels have internal linkage, which dladdr does not see: names are in the symbol table of the file itself.
std::string kernel_name(const void* kernel) {
    static std::map<uintptr_t, std::string> names;  // by offset in the file; guarded by mutex
    Dl_info file;
    if (!dladdr(kernel, &file)) return "?";
    if (names.empty()) {
        std::ifstream stream(file.dli_fname, std::ios::binary);
        const std::vector<char> bytes((std::istreambuf_iterator<char>(stream)), {});
        const auto* header = reinterpret_cast<const Elf64_Ehdr*>(bytes.data());
        const auto* sections = reinterpret_cast<const Elf64_Shdr*>(bytes.data() + header->e_shoff);
        for (int i = 0; i < header->e_shnum; i++) {
            if (sections[i].sh_type != SHT_SYMTAB) continue;
            const char* strings = bytes.data() + sections[sections[i].sh_link].sh_offset;
            const auto* symbols = reinterpret_cast<const Elf64_Sym*>(bytes.data() + sections[i].sh_offset);
            for (size_t s = 0; s < sections[i].sh_size / sizeof *symbols; s++)
                if (ELF64_ST_TYPE(symbols[s].st_info) == STT_FUNC)
                    names[symbols[s].st_value] = strings + symbols[s].st_name;
        }
    }
    const auto found = names.find(static_cast<const char*>(kernel) - static_cast<const char*>(file.dli_fbase));
    if (found == names.end()) return "?";
    int status = 0;
    char* demangled = abi::__cxa_demangle(found->second.c_str(), nullptr, nullptr, &status);
    std::string name = status == 0 ? demangled : found->second;
    free(demangled);
    const std::string anonymous = "(anonymous namespace)::";
    for (size_t at; (at = name.find(anonymous)) != std::string::npos;) name.erase(at, anonymous.size());
    if (name.compare(0, 5, "void ") == 0) name.erase(0, 5);
    int depth = 0;
    for (size_t i = 0; i < name.size(); i++) {
        depth += (name[i] == '<') - (name[i] == '>');
        if (name[i] == '(' && depth == 0) name.resize(i);
    }
    return name;
}

int refuse(int code, const std::string& why) {
    error = why;
    return code;
}

}  // namespace

void fail(Place place, const char* format, ...) {
    char buffer[512];
    va_list list;
    va_start(list, format);
    vsnprintf(buffer, sizeof buffer, format, list);
    va_end(list);
    const uint3 t = here->thread;
    fail_with(text("thread (%u, %u, %u), %s: ", t.x, t.y, t.z, text(place).c_str()) + buffer);
}

std::string text(const char* format, ...) {
    char buffer[512];
    va_list list;
    va_start(list, format);
    vsnprintf(buffer, sizeof buffer, format, list);
    va_end(list);
    return buffer;
}

std::string text(Place place) { return text("%s:%d", base_name(place.file), place.line); }

Running running() { return {self()->index, self()->warp, self()->lane, block->threads}; }

std::unique_ptr<BlockState>& block_state() { return block->state; }

void wait_until(const char* name, const std::function<bool()>& ready, Place place) {
    perhaps_preempt(place);
    while (!ready()) {
        block->waiting.emplace_back(self(), ready);
        wait(name, place);
    }
}

void something_changed() {
    auto& waiting = block->waiting;
    for (size_t i = 0; i < waiting.size();) {
        if (!waiting[i].second()) {
            i++;
            continue;
        }
        block->runnable.push_back(waiting[i].first);
        waiting.erase(waiting.begin() + i);
    }
}

void give_way(const char* name, Place place) { let_others_go_first(name, place); }

bool perhaps_now() { return block->order == FIFO || (block->order != REVERSE && block->draw() % 2); }

void do_later(std::function<void()> work) { block->work.push_back(std::move(work)); }

const std::vector<SharedVariable>& shared_variables() { return block->variables; }

Span shared_memory() { return {block->shared, kArena}; }

void sync_threads(Place place) {
    const Unseen unseen;
    if (block->at_barrier.empty()) block->barrier_place = place;
    if (!(block->barrier_place == place))
        fail(place, "__syncthreads meets another one, at %s", text(block->barrier_place).c_str());
    // in turn one of two, so that a thread already on its way to the next barrier orders nothing for this one
    void* order_by = &block->at_barrier + block->barrier_generation % 2;
    release(order_by);
    block->at_barrier.push_back(self());
    const int generation = block->barrier_generation;
    open_barrier_if_all_came();
    if (generation == block->barrier_generation)
        wait("__syncthreads", place);
    else
        let_others_go_first("__syncthreads", place);
    acquire(order_by);
}

void sync_warp(uint32_t mask, Place place) {
    const Unseen unseen;
    Warp* warp = &block->warps[self()->warp];
    release(warp);
    meet("__syncwarp", mask, place, [](Fiber*) {});
    acquire(warp);
}

uint32_t ballot(uint32_t mask, bool predicate, Place place) {
    const Unseen unseen;
    self()->bits = predicate;
    meet("a vote", mask, place, [mask](Fiber* lanes) {
        uint32_t votes = 0;
        for (int i = 0; i < 32; i++)
            if (mask >> i & 1 && lanes[i].bits) votes |= 1u << i;
        for (int i = 0; i < 32; i++)
            if (mask >> i & 1) lanes[i].bits = votes;
    });
    return static_cast<uint32_t>(self()->bits);
}

uint64_t shuffle(Shuffle kind, uint32_t mask, uint64_t bits, int operand, int width, Place place) {
    const Unseen unseen;
    static const char* const names[] = {"__shfl_sync", "__shfl_xor_sync", "__shfl_down_sync", "__shfl_up_sync"};
    const char* name = names[static_cast<int>(kind)];
    if (width < 1 || width > 32 || (width & (width - 1)))
        fail(place, "%s: width is %d, must be a power of two up to 32", name, width);
    Fiber* me = self();
    const int lane = me->lane, first = lane & ~(width - 1);
    int source = lane;
    switch (kind) {
        case Shuffle::kIndex: source = first | (operand & (width - 1)); break;
        case Shuffle::kXor: source = lane ^ operand; break;
        case Shuffle::kDown: source = lane + operand; break;
        case Shuffle::kUp: source = lane - operand; break;
    }
    const bool outside = source >= first + width || source < (kind == Shuffle::kUp ? first : 0);
    me->source = outside ? lane : source;
    me->bits = bits;
    meet(name, mask, place, [&](Fiber* lanes) {
        uint64_t brought[32];
        for (int i = 0; i < 32; i++) {
            if (!(mask >> i & 1)) continue;
            if (!(mask >> lanes[i].source & 1))
                fail(place, "%s: lane %d reads lane %d, which is not in mask %08x", name, i, lanes[i].source, mask);
            brought[i] = lanes[lanes[i].source].bits;
        }
        for (int i = 0; i < 32; i++)
            if (mask >> i & 1) lanes[i].bits = brought[i];
    });
    return me->bits;
}

void together(const char* name, void* mine, void (*finish)(void* const* of_lanes), Place place) {
    const Unseen unseen;
    self()->bits = reinterpret_cast<uint64_t>(mine);
    meet(name, 0xffffffffu, place, [finish](Fiber* lanes) {
        void* of_lanes[32];
        for (int i = 0; i < 32; i++) of_lanes[i] = reinterpret_cast<void*>(lanes[i].bits);
#ifdef FASTATTN_RECORD
        block->for_a_warp = true;
        finish(of_lanes);
        block->for_a_warp = false;
#else
        finish(of_lanes);
#endif
    });
}

void* shared_array(const void* key, const char* name, size_t bytes, size_t align) {
    const Unseen unseen;
    for (const SharedVariable& v : block->variables)
        if (v.key == key) return v.start;
    // not aligned to more than was asked for, 8 bytes at least
    align = std::max<size_t>(align, 8);
    size_t at = (block->shared_top - 2 * kGuard - bytes) & ~(2 * align - 1);
    at += align;
    block->shared_top = at - kGuard;
    size_t total = bytes;
    for (const SharedVariable& v : block->variables)
        if (v.key) total += v.bytes;
    if (total > kSharedUnasked)
        fail_with(text("%s does not fit: variables of a fixed size have %zu bytes of shared memory", name, kSharedUnasked));
    return make_shared(key, name, block->shared + at, bytes);
}

void* shared_dynamic(size_t align) {
    const Unseen unseen;
    for (const SharedVariable& v : block->variables)
        if (!v.key) return v.start;
    return make_shared(nullptr, "the dynamic shared memory", block->shared + (align < kGuard ? 2 * kGuard : 0) + align,
                       block->shared_dynamic_bytes);
}

void access(Access, const void* address, size_t bytes, Place place) {
    const Unseen unseen;
    const size_t align = std::min<size_t>(bytes & -bytes, 16);
    if (reinterpret_cast<uintptr_t>(address) % align)
        fail(place, "%zu bytes at %p, an address not aligned to %zu", bytes, address, align);
    perhaps_preempt(place);
}

// FIFO makes a copy at once, REVERSE when it is waited for, the others either; until then the place it goes to is poison. So
// what is read too early, there or by a thread that no barrier tells, is wrong under some order.
void copy_async(void* to, const void* from, size_t read, size_t bytes, Place place) {
    access(Access::kRead, from, bytes, place);
    if (read > bytes) fail(place, "an asynchronous copy of %zu bytes that reads %zu", bytes, read);
    const auto at = static_cast<unsigned char*>(to);
    if (at < block->shared || at + bytes > block->shared + kArena || (at - block->shared) % bytes)
        fail(place, "an asynchronous copy of %zu bytes to %p, which is no shared memory aligned to them", bytes, to);
    const auto instruction = static_cast<const char*>(__builtin_return_address(0));
    if (read) record(instruction, false, from, read);
    record(instruction + 1, true, to, bytes);  // counted apart: lanes that read nothing write too
    const Copy copy{to, from, read, bytes, self()->copy_group};
    if (perhaps_now()) {
        copy.make();
    } else {
        memset(to, kPoison, bytes);
        self()->copies.push_back(copy);
    }
}

void copy_commit() { self()->copy_group++; }

void copy_wait(int pending) {
    Fiber* me = self();
    for (; !me->copies.empty() && me->copies.front().group < me->copy_group - pending; me->copies.pop_front())
        me->copies.front().make();
}

int launch(const void* kernel, dim3 grid, dim3 dim, size_t smem, Body body, const void* arguments) {
    if (left_out) return cudaSuccess;
    const int64_t threads = int64_t{dim.x} * dim.y * dim.z, blocks = int64_t{grid.x} * grid.y * grid.z;
    std::string name;
    Order wanted;
    {
        std::lock_guard<std::mutex> lock(mutex);
        name = kernel_name(kernel);
        if (threads < 1 || threads > 1024 || blocks < 1 || grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535)
            return refuse(cudaErrorInvalidConfiguration,
                          text("%s: a grid of (%u, %u, %u) blocks of (%u, %u, %u) threads", name.c_str(), grid.x, grid.y,
                               grid.z, dim.x, dim.y, dim.z));
        const auto asked = shared_asked.find(kernel);
        const size_t allowed = asked == shared_asked.end() ? kSharedUnasked : asked->second;
        if (smem > allowed)
            return refuse(cudaErrorInvalidValue, text("%s: %zu bytes of dynamic shared memory, %zu are allowed",
                                                      name.c_str(), smem, allowed));
        launched[kernel]++;
        wanted = order;
    }

    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    const auto work = [&] {
        auto b = take_block(static_cast<int>(threads));
        b->grid = grid;
        b->dim = dim;
        b->order = wanted;
        b->shared_dynamic_bytes = smem;
        b->body = body;
        b->arguments = arguments;
        for (int64_t i; !failed && (i = next++) < blocks;) {
            b->failure.clear();
            run_block(*b, wanted == REVERSE || wanted == PCT ? blocks - 1 - i : i);
#ifdef FASTATTN_RECORD
            {
                std::lock_guard<std::mutex> lock(mutex);
                add_up(recorded[kernel], *b);
            }
            b->instructions.clear();
            b->visits.clear();
#endif
            if (b->failure.empty()) continue;
            std::lock_guard<std::mutex> lock(mutex);
            failed = true;
            error = text("%s, block (%u, %u, %u)", name.c_str(), b->index.x, b->index.y, b->index.z) + ", " + b->failure;
        }
        std::lock_guard<std::mutex> lock(mutex);
        spare.push_back(std::move(b));
    };
    std::vector<std::thread> workers;
    for (int i = 1; i < std::min<int64_t>(os_threads(), blocks); i++) workers.emplace_back(work);
    work();
    for (auto& w : workers) w.join();
    return failed ? cudaErrorLaunchFailure : cudaSuccess;
}

void schedule(Order wanted, uint64_t with_seed) {
    std::lock_guard<std::mutex> lock(mutex);
    order = wanted;
    seed = with_seed;
}

void pretend(int major) { major_capability = major; }

void leave_out_launches(bool yes) { left_out = yes; }

std::string last_error() {
    std::lock_guard<std::mutex> lock(mutex);
    return error;
}

std::map<std::string, int64_t> launches() {
    std::lock_guard<std::mutex> lock(mutex);
    std::map<std::string, int64_t> by_name;
    for (const auto& [kernel, count] : launched) by_name[kernel_name(kernel)] += count;
    return by_name;
}

#ifdef FASTATTN_RECORD
std::map<std::string, Traffic> traffic() {
    std::lock_guard<std::mutex> lock(mutex);
    std::map<std::string, Traffic> by_name;
    for (auto& [kernel, sum] : recorded) {
        sum.sectors_read = sum.read.size();
        sum.sectors_written = sum.written.size();
        by_name[kernel_name(kernel)] = sum;
    }
    recorded.clear();
    return by_name;
}
#endif

}  // namespace emulation

#ifdef FASTATTN_RECORD
// With -fsanitize=thread the compiler calls these before each load and store of a kernel: TSAN's names, and not TSAN.
extern "C" {
#define FASTATTN_RECORD_SIZE(bytes)                                                                             \
    void __tsan_read##bytes(void* at) { emulation::record(__builtin_return_address(0), false, at, bytes); }     \
    void __tsan_write##bytes(void* at) { emulation::record(__builtin_return_address(0), true, at, bytes); }
FASTATTN_RECORD_SIZE(1)
FASTATTN_RECORD_SIZE(2)
FASTATTN_RECORD_SIZE(4)
FASTATTN_RECORD_SIZE(8)
FASTATTN_RECORD_SIZE(16)
void __tsan_read_range(void* at, size_t bytes) { emulation::record(__builtin_return_address(0), false, at, bytes); }
void __tsan_write_range(void* at, size_t bytes) { emulation::record(__builtin_return_address(0), true, at, bytes); }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
#endif

// What launchers ask of the CUDA runtime.
extern "C" cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
    *attributes = {};
    attributes->maxThreadsPerBlock = 1024;
    return cudaSuccess;
}

extern "C" cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value > static_cast<int>(emulation::kSharedMax))
        return cudaErrorInvalidValue;
    std::lock_guard<std::mutex> lock(emulation::mutex);
    emulation::shared_asked[kernel] = value;
    return cudaSuccess;
}

extern "C" cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}

extern "C" cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    switch (attribute) {
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = emulation::kSharedMax; return cudaSuccess;
        case cudaDevAttrComputeCapabilityMajor: *value = emulation::major_capability; return cudaSuccess;
        case cudaDevAttrComputeCapabilityMinor: *value = 0; return cudaSuccess;
        default: return cudaErrorInvalidValue;
    }
}
