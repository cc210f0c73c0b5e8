// Instructions from sm_90 on; sm90.h says what is modelled.

#include "sm90.h"

#include <algorithm>
#include <array>
#include <deque>
#include <map>

#include "scheduler.h"
#include "tensor_core.h"

namespace emulation {

namespace {

constexpr int kMostArrivals = (1 << 20) - 1, kMostBytes = (1 << 20) - 1;
constexpr uint64_t kInitialised = 0x6d62617272696572, kMap = 0x74656e736f726d61;
constexpr uint32_t kWindow = 1 << 18;  // that descriptors reach
constexpr int kWarps = 4;              // of a warpgroup

struct Mbarrier {
    int arrivals, missing, phase;
    int64_t bytes;  // expected and not here yet
    bool fenced;    // since its initialisation
};

struct NamedBarrier {
    int threads, arrived, generation;
};

struct Store {
    TensorMap map;
    const unsigned char* from;
    std::array<int, 5> at;
    int group;
    std::vector<unsigned char> tile;  // once it is read
    Place place;
};

struct Stores {
    std::deque<Store> unfinished;
    int group = 0;
};

// The accumulators of a warp that products are under way to: the threads' own registers are NaN until the last has been
// waited for.
struct Accumulators {
    int n, products;
    float* registers[32];
    std::vector<float> values;  // of 16 rows
};

struct Product {
    Wgmma of;
    int group;
    bool made;
    const uint32_t* a_at[32];
    uint32_t a[32][4];
};

struct Warp {
    std::map<float*, Accumulators> accumulators;  // by the first lane's
    std::deque<Product> products;
    int group = 0;
    bool late = false;    // whether what is issued is made when it is waited for
    bool fenced = false;  // since the last commit
    int registers = 0;
    size_t issued = 0;
};

struct State : BlockState {
    std::map<uint64_t*, Mbarrier> mbarriers;
    std::map<int, NamedBarrier> named;
    std::map<int, Stores> stores;  // by thread
    std::map<int, Warp> warps;
    std::map<int, std::vector<Wgmma>> issued;  // by warpgroup, what its first warp to come issued
    int free_registers = 0;
    std::vector<unsigned char> published = std::vector<unsigned char>(shared_memory().bytes, kPoison);

    void thread_exits(int thread) override;
    void block_ends() override;
    std::string waited_for() const override;
};

State& state() {
    auto& kept = block_state();
    if (!kept) kept = std::make_unique<State>();
    return static_cast<State&>(*kept);
}

uint32_t offset_of(const void* shared) {
    return static_cast<uint32_t>(static_cast<const unsigned char*>(shared) - shared_memory().start);
}

// What copies and wgmma see of it.
unsigned char* published(const void* shared) { return &state().published[offset_of(shared)]; }

void check_published(const char* what, const unsigned char* start, size_t bytes, Place place) {
    if (memcmp(start, published(start), bytes))
        fail(place, "%s shared memory that threads have written since the last fence.proxy.async", what);
}

bool is_shared(const void* start, size_t bytes) {
    const auto at = static_cast<const unsigned char*>(start);
    for (const SharedVariable& v : shared_variables())
        if (at >= v.start && at + bytes <= v.start + v.bytes) return true;
    return false;
}

uint32_t swizzled(uint32_t address, int swizzle) { return address ^ (address >> 3 & ((1u << swizzle) - 1) << 4); }

// f(bytes of the tile, in shared memory's order; its element's address, or null outside the tensor) for each element.
template <typename F>
void each_element(const TensorMap& map, const std::array<int, 5>& at, uint32_t tile, F f) {
    int rows = 1;
    for (int d = 1; d < map.rank; d++) rows *= map.box[d];
    for (int row = 0; row < rows; row++) {
        unsigned char* start = map.start;
        bool inside = true;
        for (int d = 1, left = row; d < map.rank; left /= map.box[d++]) {
            const int64_t i = int64_t{at[d]} + left % map.box[d];
            inside &= i >= 0 && i < map.size[d];
            start += i * map.stride[d];
        }
        for (int x = 0; x < map.box[0]; x++) {
            const int64_t i = int64_t{at[0]} + x;
            const uint32_t address = tile + (row * map.box[0] + x) * 2;
            f(swizzled(address, map.swizzle) - tile, inside && i >= 0 && i < map.size[0] ? start + i * 2 : nullptr);
        }
    }
}

size_t tile_bytes(const TensorMap& map) {
    size_t bytes = 2;
    for (int d = 0; d < map.rank; d++) bytes *= map.box[d];
    return bytes;
}

void check_tile(const char* what, const TensorMap* map, const void* tile, int rank, Place place) {
    if (reinterpret_cast<uintptr_t>(map) % 64 || map->made != kMap)
        fail(place, "%s: no tensor map aligned to 64 bytes is at %p", what, static_cast<const void*>(map));
    if (map->rank != rank) fail(place, "%s: %d coordinates for a tensor of %d dimensions", what, rank, map->rank);
    // a swizzle follows bits of the address: a tile that starts elsewhere would be another one
    const size_t align = map->swizzle ? 128u << map->swizzle : 128;
    if (offset_of(tile) % align || !is_shared(tile, tile_bytes(*map)))
        fail(place, "%s: %zu bytes at %#x are no shared memory aligned to %zu", what, tile_bytes(*map), offset_of(tile),
             align);
}

Mbarrier& mbarrier_at(uint64_t* barrier, Place place) {
    const auto found = state().mbarriers.find(barrier);
    if (found == state().mbarriers.end()) fail(place, "no mbarrier is initialised at %#x", offset_of(barrier));
    if (*barrier != kInitialised) fail(place, "the mbarrier at %#x is overwritten", offset_of(barrier));
    return found->second;
}

void mbarrier_update(uint64_t* barrier, int arrivals, int64_t bytes, Place place) {
    Mbarrier& b = mbarrier_at(barrier, place);
    if (b.missing < arrivals)
        fail(place, "an arrival more than the %d of the mbarrier at %#x", b.arrivals, offset_of(barrier));
    b.missing -= arrivals;
    b.bytes += bytes;
    if (std::abs(b.bytes) > kMostBytes)
        fail(place, "the mbarrier at %#x expects %ld bytes", offset_of(barrier), long(b.bytes));
    if (b.missing || b.bytes) return;
    b.missing = b.arrivals;
    b.phase++;
    something_changed();
}

// Threads that arrive for a phase are before those that waited for it.
void* order_of(uint64_t* barrier, int phase) { return reinterpret_cast<char*>(barrier) + phase % 2; }

void read(Store& s) {
    if (!s.tile.empty()) return;
    s.tile.resize(tile_bytes(s.map));
    check_published("a store reads", s.from, s.tile.size(), s.place);
    memcpy(s.tile.data(), s.from, s.tile.size());
}

void write(Store& s) {
    read(s);
    each_element(s.map, s.at, offset_of(s.from), [&](uint32_t at, unsigned char* element) {
        if (element) memcpy(element, &s.tile[at], 2);
    });
}

// An operand of wgmma in shared memory: 8 neighbours along one dimension lie together.
struct Operand {
    uint32_t start, leading, stride;
    int swizzle;

    Operand(uint64_t descriptor, Place place)
        : start((descriptor & 0x3fff) << 4),
          leading((descriptor >> 16 & 0x3fff) << 4),
          stride((descriptor >> 32 & 0x3fff) << 4),
          swizzle((4 - static_cast<int>(descriptor >> 62)) % 4) {
        if (descriptor & (3ull << 14 | 3ull << 30 | 0xffffull << 46))
            fail(place, "wgmma: descriptor %016lx has bits set that are no address, offset or swizzle", long(descriptor));
        const uint32_t row = 16u << swizzle;
        if (swizzle && start % (8 * row) >= row)
            fail(place, "wgmma: an operand at %#x, which is not in the first row of a pattern of 8 rows of %u bytes", start,
                 row);
    }

    // Where 8 elements lie: of the row `across` at 8 `piece`, where they are neighbours along k; of row k, else.
    uint32_t piece_along_k(int across, int piece) const {
        const uint32_t row = across / 8 * stride + across % 8 * (16 << swizzle);
        return swizzled(start + row + piece * (swizzle ? 16 : leading), swizzle);
    }
    uint32_t piece_across(int piece, int k) const {
        const int wide = 1 << swizzle;
        if (!swizzle) return start + piece * stride + k % 8 * 16 + k / 8 * leading;
        return swizzled(start + piece % wide * 16 + piece / wide * leading + k % 8 * wide * 16 + k / 8 * stride, swizzle);
    }
};

float number(uint16_t bits, bool half) {
    return half ? static_cast<float>(bits_as<__half>(bits)) : static_cast<float>(bits_as<__nv_bfloat16>(bits));
}

// Rows first to first + count of an operand, 16 numbers each.
void load_rows(uint64_t descriptor, bool along_k, int first, int count, bool half, float (*to)[16], Place place) {
    const Operand operand(descriptor, place);
    const auto piece = [&](uint32_t address, uint16_t(&eight)[8]) {
        const unsigned char* at = shared_memory().start + address;
        if (address + 16 > kWindow || !is_shared(at, 16))
            fail(place, "wgmma: an operand at %#x is outside of shared memory", address);
        check_published("wgmma reads", at, 16, place);
        memcpy(eight, at, 16);
    };
    uint16_t eight[8];
    for (int i = 0; along_k && i < count; i++)
        for (int p = 0; p < 2; p++) {
            piece(operand.piece_along_k(first + i, p), eight);
            for (int e = 0; e < 8; e++) to[i][8 * p + e] = number(eight[e], half);
        }
    for (int p = 0; !along_k && p < count / 8; p++)
        for (int k = 0; k < 16; k++) {
            piece(operand.piece_across(first / 8 + p, k), eight);
            for (int e = 0; e < 8; e++) to[8 * p + e][k] = number(eight[e], half);
        }
}

// Accumulator i of a lane: row and column in the 16 rows of its warp.
std::pair<int, int> place_of(int lane, int i) { return {lane / 4 + i / 2 % 2 * 8, i / 4 * 8 + lane % 4 * 2 + i % 2}; }

void make(Product& p, Warp& warp, int warp_index) {
    if (p.made) return;
    p.made = true;
    const Wgmma& w = p.of;
    float a[16][16], b[256][16];
    if (w.a_registers) {
        for (int lane = 0; lane < 32; lane++)
            for (int i = 0; i < 4; i++)
                for (int h = 0; h < 2; h++)
                    a[lane / 4 + i % 2 * 8][lane % 4 * 2 + h + i / 2 * 8] = number(p.a[lane][i] >> 16 * h, w.half);
    } else {
        load_rows(w.a, w.a_along_k, warp_index % kWarps * 16, 16, w.half, a, w.place);
    }
    load_rows(w.b, w.b_along_k, 0, w.n, w.half, b, w.place);
    auto& values = warp.accumulators[w.d].values;
    for (int m = 0; m < 16; m++)
        for (int n = 0; n < w.n; n++) {
            double sum = w.adds ? values[m * w.n + n] : 0;
            for (int k = 0; k < 16; k++) sum += double{a[m][k]} * double{b[n][k]};
            values[m * w.n + n] = cut(sum);
        }
}

// One product of a warp is over, the oldest.
void finish(Warp& warp) {
    const Product& p = warp.products.front();
    for (int lane = 0; lane < 32 && p.of.a_registers; lane++)
        if (memcmp(p.a_at[lane], p.a[lane], sizeof p.a[lane]))
            fail(p.of.place, "wgmma: registers of its left operand are written before it has been waited for");
    const auto found = warp.accumulators.find(p.of.d);
    Accumulators& to = found->second;
    for (float* r : to.registers)
        for (int i = 0; i < to.n / 2; i++)
            if (bits_as<uint32_t>(r[i]) != 0xffffffffu)
                fail(p.of.place, "wgmma: an accumulator is written before the product has been waited for");
    if (--to.products == 0) {
        for (int lane = 0; lane < 32; lane++)
            for (int i = 0; i < to.n / 2; i++) {
                const auto [m, n] = place_of(lane, i);
                to.registers[lane][i] = to.values[m * to.n + n];
            }
        warp.accumulators.erase(found);
    }
    warp.products.pop_front();
}

bool same(const Wgmma& x, const Wgmma& y) {
    return x.place == y.place && x.n == y.n && x.a == y.a && x.b == y.b && x.adds == y.adds;
}

void issue(void* const* of_lanes) {
    const Wgmma& first = *static_cast<Wgmma*>(of_lanes[0]);
    const Running me = running();
    const Place place = first.place;
    Warp& warp = state().warps[me.warp];
    if (me.threads % (32 * kWarps))
        fail(place, "wgmma in a block of %d threads, which are no whole warpgroups", me.threads);
    if (!warp.fenced) fail(place, "wgmma: no wgmma.fence since the last group of products");

    // all warps of a warpgroup are to do the same
    auto& issued = state().issued[me.warp / kWarps];
    if (warp.issued == issued.size()) issued.push_back(first);
    const Wgmma& other = issued[warp.issued++];
    if (!same(first, other))
        fail(place, "wgmma: another warp of the warpgroup does a different one, at %s", text(other.place).c_str());

    Product p{first, warp.group, false, {}, {}};
    const auto [found, is_new] = warp.accumulators.try_emplace(first.d);
    Accumulators& to = found->second;
    if (is_new) {
        to.n = first.n;
        to.products = 0;
        to.values.resize(16 * first.n);
    }
    if (to.n != first.n) fail(place, "wgmma: products of %d and of %d columns on the same accumulators", first.n, to.n);
    to.products++;
    for (int lane = 0; lane < 32; lane++) {
        const Wgmma& w = *static_cast<Wgmma*>(of_lanes[lane]);
        if (!same(w, first)) fail(place, "wgmma: the lanes of a warp have different operands");
        if (w.a_registers) {
            p.a_at[lane] = w.a_registers;
            memcpy(p.a[lane], w.a_registers, sizeof p.a[lane]);
        }
        if (!is_new) continue;
        to.registers[lane] = w.d;
        for (int i = 0; i < w.n / 2; i++) {
            const auto [m, n] = place_of(lane, i);
            to.values[m * w.n + n] = w.d[i];
        }
        memset(static_cast<void*>(w.d), kPoison, w.n / 2 * sizeof(float));
    }
    // in order, and a group as a whole
    if (warp.products.empty() || (!warp.late && warp.products.back().group != warp.group)) warp.late = !perhaps_now();
    warp.products.push_back(p);
    if (!warp.late) make(warp.products.back(), warp, me.warp);
}

struct BarrierLane {
    int id, threads;
    Place place;
    int generation;
};

void arrive(void* const* of_lanes) {
    const BarrierLane& first = *static_cast<BarrierLane*>(of_lanes[0]);
    const int most = running().threads;
    if (first.id < 1 || first.id > 15 || first.threads < 32 || first.threads % 32 || first.threads > most)
        fail(first.place, "barrier %d of %d threads: 1 to 15, of whole warps and at most the block's %d", first.id,
             first.threads, most);
    NamedBarrier& b = state().named[first.id];
    if (!b.arrived) b.threads = first.threads;
    if (b.threads != first.threads)
        fail(first.place, "barrier %d of %d threads, while others wait there for %d", first.id, first.threads, b.threads);
    for (int lane = 0; lane < 32; lane++) {
        auto& l = *static_cast<BarrierLane*>(of_lanes[lane]);
        if (l.id != first.id || l.threads != first.threads) fail(l.place, "the lanes of a warp come to different barriers");
        l.generation = b.generation;
    }
    b.arrived += 32;
    if (b.arrived < b.threads) return;
    b.arrived = 0;
    b.generation++;
    something_changed();
}

struct PlacedLane {
    Place place;
};

void State::thread_exits(int thread) {
    Warp& warp = warps[thread / 32];
    if (!warp.products.empty())
        fail(warp.products.front().of.place, "wgmma: a thread exits before its products have been waited for");
    for (const Store& s : stores[thread].unfinished)
        if (s.tile.empty()) fail(s.place, "a thread exits before its store has read shared memory");
}

void State::block_ends() {
    for (auto& [barrier, b] : mbarriers)
        if (b.bytes)
            fail({"mbarrier", 0}, "at the block's end the one at %#x lacks %ld bytes", offset_of(barrier), long(b.bytes));
    for (auto& [group, products] : issued)
        for (int i = 0; i < kWarps; i++)
            if (warps[group * kWarps + i].issued != products.size())
                fail(products.back().place, "wgmma: not all warps of warpgroup %d have issued it", group);
    for (auto& [thread, of_thread] : stores)
        for (Store& s : of_thread.unfinished) write(s);
}

std::string State::waited_for() const {
    std::string said;
    for (const auto& [barrier, b] : mbarriers)
        if ((b.missing != b.arrivals || b.bytes) && said.size() < 300)
            said += text(" the mbarrier at %#x lacks %d arrivals and %ld bytes;", offset_of(barrier), b.missing,
                         long(b.bytes));
    return said;
}

}  // namespace

int encode_tensor_map(TensorMap* map, int rank, const void* start, const int64_t* size, const int64_t* stride,
                      const int* box, int swizzle) {
    if (rank < 1 || rank > 5 || swizzle < 0 || swizzle > 3) return cudaErrorInvalidValue;
    if (reinterpret_cast<uintptr_t>(map) % 64 || reinterpret_cast<uintptr_t>(start) % 16) return cudaErrorInvalidValue;
    *map = {kMap, static_cast<unsigned char*>(const_cast<void*>(start)), rank, swizzle, {}, {2}, {}};
    for (int d = 0; d < rank; d++) {
        map->size[d] = size[d];
        map->box[d] = box[d];
        if (size[d] < 1 || size[d] > int64_t{1} << 32 || box[d] < 1 || box[d] > 256) return cudaErrorInvalidValue;
        if (d == 0) continue;
        map->stride[d] = stride[d - 1];
        if (stride[d - 1] % 16 || stride[d - 1] < 0 || stride[d - 1] >= int64_t{1} << 40) return cudaErrorInvalidValue;
    }
    if (box[0] * 2 % 16 || (swizzle && box[0] * 2 > 16 << swizzle)) return cudaErrorInvalidValue;
    return 0;
}

void mbarrier_init(uint64_t* barrier, int arrivals, Place place) {
    const Unseen unseen;
    if (reinterpret_cast<uintptr_t>(barrier) % 8 || !is_shared(barrier, 8))
        fail(place, "an mbarrier at %p, which is no shared memory aligned to 8", static_cast<void*>(barrier));
    if (arrivals < 1 || arrivals > kMostArrivals) fail(place, "an mbarrier of %d arrivals", arrivals);
    if (!state().mbarriers.insert({barrier, {arrivals, arrivals, 0, 0, false}}).second)
        fail(place, "an mbarrier is initialised at %#x already", offset_of(barrier));
    *barrier = kInitialised;
}

void mbarrier_arrive(uint64_t* barrier, int bytes, Place place) {
    const Unseen unseen;
    give_way("mbarrier.arrive", place);
    release(order_of(barrier, mbarrier_at(barrier, place).phase));
    mbarrier_update(barrier, 1, bytes, place);
    give_way("mbarrier.arrive", place);
}

bool mbarrier_try_wait(uint64_t* barrier, int parity, Place place) {
    const Unseen unseen;
    give_way("mbarrier.try_wait", place);
    const int phase = mbarrier_at(barrier, place).phase;
    if (phase % 2 == parity) return false;
    acquire(order_of(barrier, parity));
    return true;
}

void mbarrier_wait(uint64_t* barrier, int parity, Place place) {
    const Unseen unseen;
    const Mbarrier& b = mbarrier_at(barrier, place);
    if (parity != 0 && parity != 1) fail(place, "mbarrier.try_wait for a phase of parity %d", parity);
    wait_until("mbarrier.try_wait", [&] { return b.phase % 2 != parity; }, place);
    acquire(order_of(barrier, parity));
}

void fence_proxy_async() {
    const Unseen unseen;
    for (auto& [_, b] : state().mbarriers) b.fenced = true;
    for (const SharedVariable& v : shared_variables()) memcpy(published(v.start), v.start, v.bytes);
}

void tensor_load(void* to, const TensorMap* map, uint64_t* barrier, const int* at, int rank, Place place) {
    const Unseen unseen;
    check_tile("cp.async.bulk.tensor", map, to, rank, place);
    if (!mbarrier_at(barrier, place).fenced)
        fail(place, "no fence.proxy.async since the mbarrier at %#x was initialised", offset_of(barrier));
    const auto tile = static_cast<unsigned char*>(to);
    const size_t bytes = tile_bytes(*map);
    check_published("a load writes over", tile, bytes, place);
    memset(tile, kPoison, bytes);
    memset(published(tile), kPoison, bytes);
    std::array<int, 5> from{};
    std::copy(at, at + rank, from.begin());
    const auto arrives = [=, map = *map] {
        for (size_t i = 0; i < bytes; i++)
            if (tile[i] != kPoison) fail(place, "shared memory is written while a copy to it is under way");
        each_element(map, from, offset_of(tile), [&](uint32_t i, const unsigned char* element) {
            uint16_t v = 0;
            if (element) memcpy(&v, element, 2);
            memcpy(tile + i, &v, 2);
            memcpy(published(tile + i), &v, 2);
        });
        mbarrier_update(barrier, 0, -static_cast<int64_t>(bytes), place);
    };
    perhaps_now() ? arrives() : do_later(arrives);
    give_way("cp.async.bulk.tensor", place);
}

void tensor_store(const TensorMap* map, const void* from, const int* at, int rank, Place place) {
    const Unseen unseen;
    check_tile("cp.async.bulk.tensor", map, from, rank, place);
    Stores& mine = state().stores[running().thread];
    Store store{*map, static_cast<const unsigned char*>(from), {}, mine.group, {}, place};
    std::copy(at, at + rank, store.at.begin());
    check_published("a store reads", store.from, tile_bytes(*map), place);
    if (perhaps_now()) read(store);
    mine.unfinished.push_back(std::move(store));
    give_way("cp.async.bulk.tensor", place);
}

void tensor_store_commit() { state().stores[running().thread].group++; }

void tensor_store_wait(int pending, bool only_read, Place place) {
    const Unseen unseen;
    give_way("cp.async.bulk.wait_group", place);
    Stores& mine = state().stores[running().thread];
    for (Store& s : mine.unfinished)
        if (s.group < mine.group - pending) read(s);
    while (!only_read && !mine.unfinished.empty() && mine.unfinished.front().group < mine.group - pending) {
        write(mine.unfinished.front());
        mine.unfinished.pop_front();
    }
}

void named_barrier(int id, int threads, bool waits, Place place) {
    const Unseen unseen;
    BarrierLane lane{id, threads, place, 0};
    NamedBarrier& b = state().named[id];
    const auto order = [&](int generation) { return reinterpret_cast<char*>(&b) + generation % 2; };
    release(order(b.generation));
    together(waits ? "bar.sync" : "bar.arrive", &lane, arrive, place);
    if (!waits) return;
    wait_until("bar.sync", [&] { return b.generation != lane.generation; }, place);
    acquire(order(lane.generation));
}

void set_registers(int count, bool more, Place place) {
    const Unseen unseen;
    const Running me = running();
    Warp& warp = state().warps[me.warp];
    // a kernel with setmaxnreg starts with all that its block's size allows
    const int at_start = std::min(256, 65536 / me.threads / 8 * 8);
    if (me.threads % (32 * kWarps))
        fail(place, "setmaxnreg in a block of %d threads, which are no whole warpgroups", me.threads);
    if (count < 24 || count > 256 || count % 8) fail(place, "setmaxnreg %d: 24 to 256 in steps of 8", count);
    PlacedLane lane{place};
    together(more ? "setmaxnreg.inc" : "setmaxnreg.dec", &lane, [](void* const*) {}, place);
    if (!warp.registers) warp.registers = at_start;
    if (me.lane == 0) {
        const int wanted = count - warp.registers;
        if (more ? wanted < 0 : wanted > 0)
            fail(place, "setmaxnreg.%s %d where there are %d", more ? "inc" : "dec", count, warp.registers);
        wait_until("setmaxnreg", [&] { return state().free_registers >= 32 * wanted; }, place);
        state().free_registers -= 32 * wanted;
        warp.registers = count;
        something_changed();
    }
    wait_until("setmaxnreg", [&] { return warp.registers == count; }, place);
}

uint32_t shared_address(const void* p, Place place) {
    if (offset_of(p) >= kWindow) fail(place, "an operand of wgmma at %p, which is no dynamic shared memory", p);
    return offset_of(p);
}

void wgmma(Wgmma lane) { together("wgmma", &lane, issue, lane.place); }

void wgmma_fence(Place place) {
    PlacedLane lane{place};
    together("wgmma.fence", &lane, [](void* const*) { state().warps[running().warp].fenced = true; }, place);
}

void wgmma_commit(Place place) {
    PlacedLane lane{place};
    together("wgmma.commit_group", &lane,
             [](void* const*) {
                 Warp& warp = state().warps[running().warp];
                 warp.group++;
                 warp.fenced = false;
             },
             place);
}

void wgmma_wait(int pending, Place place) {
    struct Lane {
        int pending;
    } lane{pending};
    together("wgmma.wait_group", &lane,
             [](void* const* of_lanes) {
                 const int index = running().warp;
                 Warp& warp = state().warps[index];
                 const int until = warp.group - static_cast<Lane*>(of_lanes[0])->pending;
                 while (!warp.products.empty() && warp.products.front().group < until) {
                     make(warp.products.front(), warp, index);
                     finish(warp);
                 }
             },
             place);
}

}  // namespace emulation
