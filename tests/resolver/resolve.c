/* Replaces getaddrinfo, as a name server under an attacker's control would. Loaded with LD_PRELOAD.
 *
 * TEST_HOSTS holds entries "name=address,name=address"; a name with several addresses has several
 * entries. With TEST_HOSTS_FILE set, TEST_HOSTS is ignored until that file exists.
 * Names with the prefix "slow-" block for TEST_SLOW_HOSTS seconds and fail. */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <netdb.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef int lookup(const char *, const char *, const struct addrinfo *, struct addrinfo **);

int getaddrinfo(const char *name, const char *service, const struct addrinfo *hints,
                struct addrinfo **found) {
    lookup *real = (lookup *)dlsym(RTLD_NEXT, "getaddrinfo");
    const char *entry = getenv("TEST_HOSTS"), *file = getenv("TEST_HOSTS_FILE");
    if (file && access(file, F_OK) != 0) entry = NULL;
    size_t length = name ? strlen(name) : 0;
    struct addrinfo *first = NULL, *last = NULL;
    const char *slow = getenv("TEST_SLOW_HOSTS");
    if (slow && name && strncmp(name, "slow-", 5) == 0) {
        sleep((unsigned)atoi(slow));
        return EAI_AGAIN;
    }
    for (; entry && *entry; entry = strchr(entry, ',') ? strchr(entry, ',') + 1 : NULL) {
        char address[64];
        if (!length || strncmp(entry, name, length) != 0 || entry[length] != '=') continue;
        const char *begin = entry + length + 1;
        size_t size = strcspn(begin, ",");
        if (size >= sizeof address) return EAI_FAIL;
        memcpy(address, begin, size);
        address[size] = 0;
        struct addrinfo numeric = {0}, *one = NULL;
        if (hints) numeric = *hints;
        numeric.ai_flags |= AI_NUMERICHOST;
        /* The C library allocates the entry, because its freeaddrinfo releases it. */
        if (real(address, service, &numeric, &one) != 0) return EAI_FAIL;
        if (last) last->ai_next = one;
        else first = one;
        for (last = one; last->ai_next; last = last->ai_next) {}
    }
    if (!first) return real(name, service, hints, found);
    *found = first;
    return 0;
}
