/* Injects one write error into a folder. Loaded before the C library:
 * `LD_PRELOAD=fault.so FAULT_FOLDER=… FAULT_CONTROL=…`.
 *
 * FAULT_CONTROL is a file of four 64-bit numbers, mapped by the test and by the server:
 * writes so far, number of the write that fails, errno of the failure, failures so far.
 * A write is any call that changes a file or makes a change durable. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

struct control {
    _Atomic int64_t count, at, number, failed;
};

static struct control *control;
static const char *folder;

__attribute__((constructor)) static void start(void) {
    const char *path = getenv("FAULT_CONTROL");
    folder = getenv("FAULT_FOLDER");
    int file = path ? open(path, O_RDWR) : -1;
    if (file < 0 || !folder) return;
    void *shared = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (shared != MAP_FAILED) control = shared;
    close(file);
}

/* Counts a write to a path in the folder; returns 1 and sets errno if the write must fail. */
static int fails_at(const char *path) {
    if (!control || strncmp(path, folder, strlen(folder)) != 0) return 0;
    int64_t count = atomic_fetch_add(&control->count, 1) + 1;
    if (count != atomic_load(&control->at)) return 0;
    atomic_fetch_add(&control->failed, 1);
    errno = (int)atomic_load(&control->number);
    return 1;
}

/* Resolves a descriptor to its path, for fails_at. */
static int fails_on(int file) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    int before = errno;
    ssize_t length = readlink(link, path, sizeof path - 1);
    errno = before;
    if (length < 0) return 0;
    path[length] = 0;
    return fails_at(path);
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define ON_FILE(kind, name, parameters, file, ...) \
    kind name parameters { return fails_on(file) ? -1 : NEXT(name)(__VA_ARGS__); }
#define AT_PATH(kind, name, parameters, path, ...) \
    kind name parameters { return fails_at(path) ? -1 : NEXT(name)(__VA_ARGS__); }

ON_FILE(ssize_t, write, (int file, const void *bytes, size_t size), file, file, bytes, size)
ON_FILE(ssize_t, writev, (int file, const struct iovec *parts, int number), file, file, parts,
        number)
ON_FILE(ssize_t, pwrite, (int file, const void *bytes, size_t size, off_t at), file, file, bytes,
        size, at)
ON_FILE(ssize_t, pwrite64, (int file, const void *bytes, size_t size, off64_t at), file, file,
        bytes, size, at)
ON_FILE(int, fsync, (int file), file, file)
ON_FILE(int, fdatasync, (int file), file, file)
ON_FILE(int, ftruncate, (int file, off_t size), file, file, size)
ON_FILE(int, ftruncate64, (int file, off64_t size), file, file, size)
AT_PATH(int, rename, (const char *from, const char *to), from, from, to)
AT_PATH(int, link, (const char *from, const char *to), from, from, to)
AT_PATH(int, unlink, (const char *path), path, path)
AT_PATH(int, mkdir, (const char *path, mode_t mode), path, path, mode)
