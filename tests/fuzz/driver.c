/* driver.c - runs a fuzz target over the files of a folder, then over mutations of them.
 *
 *   fuzz_NAME CORPUS SECONDS [ITERATIONS]    ends with whichever comes first
 *   fuzz_NAME FILE 0                         one input again
 *
 * For compilers without libFuzzer, whose targets these are, too. The nth input depends on the
 * corpus and n alone, so a run can be repeated. The target runs in a child; the current input lies
 * in memory shared with it, and is written to a file when the child dies or hangs. */
#include <dirent.h>
#include <limits.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { MAX_BYTES = 1 << 20, MAX_SEEDS = 256, MAX_CHANGES = 6, HANG_SECONDS = 30 };

typedef struct input {
    size_t size;
    uint8_t data[MAX_BYTES];
} input;

typedef struct shared {
    input now;
    long count;
} shared;

static input *seeds[MAX_SEEDS];
static size_t n_seeds;

static void fail(const char *what) {
    perror(what);
    exit(2);
}

/* ---- the corpus ---- */

static void add_seed(const char *path) {
    input *seed = malloc(sizeof *seed);
    FILE *f = fopen(path, "rb");
    if (!seed || !f) fail(path);
    seed->size = fread(seed->data, 1, sizeof seed->data, f);
    fclose(f);
    seeds[n_seeds++] = seed;
}

static int is_visible(const struct dirent *entry) {
    return entry->d_name[0] != '.';
}

static void read_corpus(const char *path) {
    struct dirent **names;
    struct stat st;
    if (stat(path, &st) != 0) fail(path);
    if (!S_ISDIR(st.st_mode)) {
        add_seed(path);
        return;
    }
    const int n = scandir(path, &names, is_visible, alphasort);
    if (n < 0) fail(path);
    for (int i = 0; i < n; i++) {
        char file[4096];
        snprintf(file, sizeof file, "%s/%s", path, names[i]->d_name);
        if (n_seeds < MAX_SEEDS) add_seed(file);
        free(names[i]);
    }
    free(names);
}

/* ---- mutations ---- */

static uint64_t state;

static uint64_t random_bits(void) { /* splitmix64 */
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static size_t below(size_t n) {
    return n ? (size_t)(random_bits() % n) : 0;
}

/* Mostly short: half of all lengths are below 8. */
static size_t some_length(size_t limit) {
    const size_t n = 1 + below((size_t)1 << (1 + below(12)));
    return n < limit ? n : limit;
}

static void erase(input *x, size_t at, size_t n) {
    memmove(x->data + at, x->data + at + n, x->size - at - n);
    x->size -= n;
}

static void insert(input *x, size_t at, const void *data, size_t n) {
    if (n > MAX_BYTES - x->size) return;
    memmove(x->data + at + n, x->data + at, x->size - at);
    memcpy(x->data + at, data, n);
    x->size += n;
}

static void overwrite(input *x, size_t at, const void *data, size_t n) {
    if (n > x->size - at) n = x->size - at;
    memcpy(x->data + at, data, n);
}

static void set_integer(input *x) {
    static const int64_t values[] = {0,         1,         -1,        127,       128,
                                     255,       256,       INT16_MAX, INT32_MAX, INT32_MIN,
                                     INT64_MAX, INT64_MIN, 1LL << 32, 1LL << 53, 100 << 20};
    const uint64_t v = (uint64_t)values[below(sizeof values / sizeof *values)] + below(3) - 1;
    overwrite(x, below(x->size), &v, (size_t)1 << below(4));
}

/* Another number in the place of one in decimal digits. */
static void set_digits(input *x) {
    static const char *const values[] = {"0",
                                         "-1",
                                         "1",
                                         "0.5",
                                         "1e9",
                                         "-0",
                                         "255",
                                         "65536",
                                         "2147483648",
                                         "9007199254740993",
                                         "18446744073709551616",
                                         "1e400",
                                         "\"\"",
                                         "null",
                                         "[]",
                                         "{}",
                                         "true"};
    size_t at = below(x->size), end;
    while (at < x->size && (x->data[at] < '0' || x->data[at] > '9')) at++;
    for (end = at; end < x->size && x->data[end] >= '0' && x->data[end] <= '9';) end++;
    const char *v = values[below(sizeof values / sizeof *values)];
    erase(x, at, end - at);
    insert(x, at, v, strlen(v));
}

static void mix(input *x) {
    const input *other = seeds[below(n_seeds)];
    const size_t from = below(other->size), n = some_length(other->size - from);
    const size_t at = below(x->size + 1);
    if (below(2))
        insert(x, at, other->data + from, n);
    else
        overwrite(x, at, other->data + from, n);
}

static void repeat(input *x) {
    uint8_t copy[4096];
    const size_t from = below(x->size), n = some_length(x->size - from);
    memcpy(copy, x->data + from, n);
    insert(x, below(x->size + 1), copy, n);
}

static void change(input *x) {
    const uint8_t byte = (uint8_t)random_bits();
    if (x->size == 0) {
        insert(x, 0, &byte, 1);
        return;
    }
    const size_t at = below(x->size);
    switch (below(9)) {
    case 0: x->data[at] ^= (uint8_t)(1 << below(8)); break;
    case 1: x->data[at] = byte; break;
    case 2: insert(x, at, &byte, 1); break;
    case 3: erase(x, at, some_length(x->size - at)); break;
    case 4: repeat(x); break;
    case 5: mix(x); break;
    case 6: set_integer(x); break;
    case 7: set_digits(x); break;
    default:
        if (below(4) == 0) x->size = at;
    }
}

/* The nth input: each file of the corpus as it is, then changed ones. */
static void make_input(input *x, long n) {
    state = (uint64_t)n * 0xd1342543de82ef95u;
    const input *seed = seeds[(size_t)n < n_seeds ? (size_t)n : below(n_seeds)];
    x->size = seed->size;
    memcpy(x->data, seed->data, seed->size);
    if ((size_t)n < n_seeds) return;
    for (size_t changes = 1 + below(MAX_CHANGES); changes > 0; changes--) change(x);
}

/* ---- running ---- */

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* A copy of exact size lets the address sanitizer see a read past its end. */
static void run_one(const input *x) {
    uint8_t *copy = malloc(x->size ? x->size : 1);
    if (!copy) fail("malloc");
    memcpy(copy, x->data, x->size);
    alarm(HANG_SECONDS);
    LLVMFuzzerTestOneInput(copy, x->size);
    free(copy);
}

static void run(shared *s, double limit, long iterations) {
    const double begin = seconds();
    while (s->count < (long)n_seeds || (s->count < iterations && seconds() - begin < limit)) {
        make_input(&s->now, s->count);
        run_one(&s->now);
        s->count++;
    }
    alarm(0);
    for (size_t i = 0; i < n_seeds; i++) free(seeds[i]);
}

static int report(const shared *s, int status) {
    char path[128];
    snprintf(path, sizeof path, "crash-%ld-%ld", (long)getpid(), s->count);
    FILE *f = fopen(path, "wb");
    const int saved = f && fwrite(s->now.data, 1, s->now.size, f) == s->now.size;
    if (f) fclose(f);
    fprintf(stderr, "input %ld: %s%s; %s %s\n", s->count,
            WIFSIGNALED(status) ? strsignal(WTERMSIG(status)) : "failed",
            WIFSIGNALED(status) && WTERMSIG(status) == SIGALRM ? " (too slow)" : "",
            saved ? "it was saved as" : "it could not be saved as", path);
    return 1;
}

int main(int argc, char **argv) {
    if (argc < 3) {
        fprintf(stderr, "usage: %s CORPUS SECONDS [ITERATIONS]\n", argv[0]);
        return 2;
    }
    read_corpus(argv[1]);
    if (n_seeds == 0) {
        fprintf(stderr, "%s: no files\n", argv[1]);
        return 2;
    }
    shared *s = mmap(NULL, sizeof *s, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (s == MAP_FAILED) fail("mmap");
    const pid_t child = fork();
    if (child < 0) fail("fork");
    if (child == 0) {
        run(s, atof(argv[2]), argc > 3 ? atol(argv[3]) : LONG_MAX);
        exit(0);
    }
    int status;
    if (waitpid(child, &status, 0) != child) fail("waitpid");
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) return report(s, status);
    printf("%ld inputs from %zu files\n", s->count, n_seeds);
    return 0;
}
