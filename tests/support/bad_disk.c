/* Makes writes or flushes below BAD_DISK_FOLDER fail while the first byte of BAD_DISK_SWITCH says so.

   'w': write() fails as on a full disk; 'f': fsync() fails as on a broken one. Loaded with LD_PRELOAD. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static const volatile char *wanted;
static const char *folder;

__attribute__((constructor)) static void prepare(void) {
    const char *name = getenv("BAD_DISK_SWITCH");
    folder = getenv("BAD_DISK_FOLDER");
    if (!folder || !name) return;
    int file = open(name, O_RDONLY | O_CLOEXEC);
    if (file < 0) return;
    void *seen = mmap(NULL, 1, PROT_READ, MAP_SHARED, file, 0);
    close(file);
    if (seen != MAP_FAILED) wanted = seen;
}

static int fails(int file, char what) {
    char link[64], path[PATH_MAX];
    if (!wanted || *wanted != what) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size < 0) return 0;
    path[size] = 0;
    return strncmp(path, folder, strlen(folder)) == 0;
}

ssize_t write(int file, const void *data, size_t size) {
    static ssize_t (*real)(int, const void *, size_t);
    if (!real) real = dlsym(RTLD_NEXT, "write");
    if (fails(file, 'w')) {
        errno = ENOSPC;
        return -1;
    }
    return real(file, data, size);
}

int fsync(int file) {
    static int (*real)(int);
    if (!real) real = dlsym(RTLD_NEXT, "fsync");
    if (fails(file, 'f')) {
        errno = EIO;
        return -1;
    }
    return real(file);
}
