/* The whole of a guest: its first and only process. Writes blocks that know their place and number to its
 * disk, past its own page cache, syncs, and reads all of them again and again until a line comes on the console;
 * then says what it has found. What the disk has to hold is kept in memory alone, so that nothing but the
 * disk can be wrong about it. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { BLOCK = 4096, BLOCKS = 4096, WORDS = BLOCK / 8, COMPRESSED = 4 };

static uint64_t numbers[BLOCKS];
static uint64_t state = 88172645463325252u;

static uint64_t mix(uint64_t x) {
    x ^= x >> 30, x *= 0xbf58476d1ce4e5b9u;
    x ^= x >> 27, x *= 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

static uint64_t any(void) {
    return mix(state += 0x9e3779b97f4a7c15u);
}

static void end(const char *verdict) {
    printf("verdict: %s\n", verdict);
    fflush(stdout);
    for (;;) {
        /* The line has to get through first. */
        sleep(1);
        reboot(RB_AUTOBOOT);
    }
}

static void fail(const char *what, uint64_t block) {
    char text[200];
    snprintf(text, sizeof text, "failed: %s block %llu: %s", what, (unsigned long long)block, strerror(errno));
    end(text);
}

static void load(const char *name) {
    int fd = open(name, O_RDONLY);
    int flags = strstr(name, ".xz") ? COMPRESSED : 0;
    if (fd < 0 || (syscall(SYS_finit_module, fd, "", flags) && errno != EEXIST))
        fail(name, 0);
    close(fd);
}

/* Word 0 is the place, word 1 the number, and the others follow from both. */
static void fill(uint64_t *words, uint64_t block, uint64_t number) {
    words[0] = block, words[1] = number;
    for (int i = 2; i < WORDS; i++)
        words[i] = mix(block << 40 ^ number << 10 ^ (uint64_t)i);
}

int main(void) {
    uint64_t *have, *want, writes = 0, reads = 0, syncs = 0, number = 0, sum = 0, slowest = 0;
    char line[64], text[200], name[64];
    mount("devtmpfs", "/dev", "devtmpfs", 0, "");
    int console = open("/dev/console", O_RDWR);
    for (int fd = 0; fd < 3; fd++)
        dup2(console, fd);
    FILE *modules = fopen("/modules", "r");
    while (modules && fgets(name, sizeof name, modules)) {
        name[strcspn(name, "\n")] = 0;
        load(name);
    }
    int disk = -1;
    for (int tries = 0; disk < 0 && tries < 100; tries++) {
        disk = open("/dev/vda", O_RDWR | O_DIRECT);
        if (disk < 0)
            usleep(100000);
    }
    if (disk < 0)
        fail("/dev/vda", 0);
    if (posix_memalign((void **)&have, BLOCK, BLOCK) || posix_memalign((void **)&want, BLOCK, BLOCK))
        fail("memory", 0);
    for (uint64_t block = 0; block < BLOCKS; block++) {
        fill(want, block, numbers[block] = ++number);
        if (pwrite(disk, want, BLOCK, block * BLOCK) != BLOCK)
            fail("write", block);
    }
    if (fsync(disk))
        fail("sync", 0);
    printf("at work\n");
    fflush(stdout);
    struct pollfd told = {.fd = 0, .events = POLLIN};
    for (uint64_t round = 0;; round++) {
        uint64_t block = any() % BLOCKS;
        struct timespec start, stop;
        clock_gettime(CLOCK_MONOTONIC, &start);
        if (any() % 2) {
            fill(want, block, numbers[block] = ++number);
            if (pwrite(disk, want, BLOCK, block * BLOCK) != BLOCK)
                fail("write", block);
            writes++;
            if (any() % 16 == 0 && (syncs++, fsync(disk)))
                fail("sync", block);
        } else {
            fill(want, block, numbers[block]);
            if (pread(disk, have, BLOCK, block * BLOCK) != BLOCK)
                fail("read", block);
            if (memcmp(have, want, BLOCK))
                fail("other bytes in", block);
            reads++;
        }
        clock_gettime(CLOCK_MONOTONIC, &stop);
        uint64_t took = (stop.tv_sec - start.tv_sec) * 1000 + (stop.tv_nsec - start.tv_nsec) / 1000000;
        slowest = took > slowest ? took : slowest;
        if (round % 64 == 0 && poll(&told, 1, 0) == 1 && read(0, line, sizeof line) > 0)
            break;
    }
    if (fsync(disk))
        fail("sync", 0);
    for (uint64_t block = 0; block < BLOCKS; block++) {
        fill(want, block, numbers[block]);
        if (pread(disk, have, BLOCK, block * BLOCK) != BLOCK || memcmp(have, want, BLOCK))
            fail("other bytes at the end in", block);
        sum = mix(sum ^ numbers[block]);
    }
    snprintf(text, sizeof text, "fine, %llu writes, %llu reads, %llu syncs, slowest %llu ms, sum %016llx",
             (unsigned long long)writes, (unsigned long long)reads, (unsigned long long)syncs,
             (unsigned long long)slowest, (unsigned long long)sum);
    end(text);
}
