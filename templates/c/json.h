/* Small JSON reader: finds values in a text without building or copying anything.
 *
 * A value that is absent is an empty span. In invalid JSON a lookup returns some span of the text,
 * so call `json_valid` first where that matters. No function is recursive, so nesting needs no
 * stack. */

#ifndef JSON_H
#define JSON_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Text of one value; `ptr` is NULL if the value is absent. */
typedef struct {
    const uint8_t *ptr;
    size_t len;
} json_t;

/* Returns the position after white space. */
static inline const uint8_t *json_space(const uint8_t *at, const uint8_t *end) {
    while (at < end && (*at == ' ' || *at == '\t' || *at == '\n' || *at == '\r')) at++;
    return at;
}

/* Returns the position after the string at `at`; NULL if the string does not end. */
static inline const uint8_t *json_past_string(const uint8_t *at, const uint8_t *end) {
    for (at++; at < end; at++) {
        if (*at == '"') return at + 1;
        if (*at == '\\') at++;
    }
    return NULL;
}

/* Returns the position after the value at `at`; NULL if no value is there. */
static inline const uint8_t *json_past(const uint8_t *at, const uint8_t *end) {
    size_t depth = 0;
    for (;;) {
        at = json_space(at, end);
        if (at >= end) return NULL;
        if (*at == '"') {
            at = json_past_string(at, end);
            if (!at) return NULL;
        } else if (*at == '{' || *at == '[') {
            depth++;
            at++;
            continue;
        } else if (*at == '}' || *at == ']') {
            if (depth == 0) return NULL;
            depth--;
            at++;
        } else if (*at == ',' || *at == ':') {
            if (depth == 0) return NULL;
            at++;
            continue;
        } else {
            const uint8_t *begin = at;
            while (at < end && *at && !strchr(" \t\r\n,:{}[]\"", *at)) at++;
            if (at == begin) return NULL;
        }
        if (depth == 0) return at;
    }
}

/* Returns true if a value is this ASCII string, escaped or not. */
static inline bool json_is(json_t value, const char *text) {
    if (value.len < 2 || value.ptr[0] != '"') return false;
    const uint8_t *at = value.ptr + 1, *end = value.ptr + value.len - 1;
    for (; at < end; text++) {
        uint32_t letter = *at++;
        if (letter == '\\' && at < end) {
            static const char from[] = "bfnrt", to[] = "\b\f\n\r\t";
            const char *found;
            letter = *at++;
            if (letter == 'u' && end - at >= 4) {
                char digits[5] = {(char)at[0], (char)at[1], (char)at[2], (char)at[3], 0};
                letter = (uint32_t)strtoul(digits, NULL, 16);
                at += 4;
            } else if ((found = memchr(from, (int)letter, 5))) {
                letter = (uint8_t)to[found - from];
            }
        }
        if (*text == 0 || letter != (uint8_t)*text) return false;
    }
    return *text == 0;
}

/* Returns the last member of this name, as most parsers do, and the number of such members. */
static inline json_t json_member_counted(json_t object, const char *name, size_t *count) {
    json_t found = {NULL, 0};
    *count = 0;
    if (object.len == 0) return found;
    const uint8_t *end = object.ptr + object.len, *at = json_space(object.ptr, end);
    if (at >= end || *at != '{') return found;
    at++;
    for (;;) {
        at = json_space(at, end);
        if (at >= end || *at != '"') return found;
        const uint8_t *past = json_past_string(at, end);
        if (!past) return found;
        json_t key = {at, (size_t)(past - at)};
        at = json_space(past, end);
        if (at >= end || *at != ':') return found;
        at = json_space(at + 1, end);
        past = json_past(at, end);
        if (!past) return found;
        if (json_is(key, name)) {
            found = (json_t){at, (size_t)(past - at)};
            ++*count;
        }
        at = json_space(past, end);
        if (at < end && *at == ',') at++;
    }
}

/* Returns the last member of this name. */
static inline json_t json_member(json_t object, const char *name) {
    size_t count;
    return json_member_counted(object, name, &count);
}

/* Returns the next element of an array. Set `*at` to NULL before the first call. */
static inline json_t json_next(json_t array, const uint8_t **at) {
    json_t none = {NULL, 0};
    if (array.len == 0 || array.ptr[0] != '[') return none;
    const uint8_t *end = array.ptr + array.len, *begin = *at ? *at : array.ptr;
    begin = json_space(*at ? begin : begin + 1, end);
    if (begin < end && *begin == ',') begin = json_space(begin + 1, end);
    const uint8_t *past = begin < end && *begin != ']' ? json_past(begin, end) : NULL;
    if (!past) return none;
    *at = past;
    return (json_t){begin, (size_t)(past - begin)};
}

/* Returns the position after the number (RFC 8259) at `at`; NULL if no number is there. */
static inline const uint8_t *json_past_number(const uint8_t *at, const uint8_t *end) {
#define JSON_DIGITS() \
    if (at >= end || *at < '0' || *at > '9') return NULL; \
    while (at < end && *at >= '0' && *at <= '9') at++
    if (at < end && *at == '-') at++;
    if (at < end && *at == '0') {
        at++;
    } else {
        JSON_DIGITS();
    }
    if (at < end && *at == '.') {
        at++;
        JSON_DIGITS();
    }
    if (at < end && (*at == 'e' || *at == 'E')) {
        at++;
        if (at < end && (*at == '+' || *at == '-')) at++;
        JSON_DIGITS();
    }
#undef JSON_DIGITS
    return at;
}

/* Reads a number of any length; returns false if the value is not a number. */
static inline bool json_number(json_t value, double *number) {
    const uint8_t *end = value.ptr + value.len;
    if (value.len == 0 || json_past_number(value.ptr, end) != end) return false;
    char *digits = malloc(value.len + 1);
    if (!digits) abort();
    memcpy(digits, value.ptr, value.len);
    digits[value.len] = 0;
    *number = strtod(digits, NULL);
    free(digits);
    return true;
}

/* Returns true if the text is one JSON value of at most MAX_DEPTH levels. Does not check UTF-8. */
static inline bool json_valid(const uint8_t *at, const uint8_t *end) {
    enum { MAX_DEPTH = 512 };
    static const char *const words[] = {"true", "false", "null"};
    uint8_t open[MAX_DEPTH];
    size_t depth = 0;
    for (;;) {
        /* A value begins here. In an object its name comes first. */
        at = json_space(at, end);
        bool ended = false;
        if (depth && open[depth - 1] == '{') {
            if (at >= end || *at != '"' || !(at = json_past_string(at, end))) return false;
            at = json_space(at, end);
            if (at >= end || *at != ':') return false;
            at = json_space(at + 1, end);
        }
        if (at >= end) return false;
        if (*at == '{' || *at == '[') {
            uint8_t bracket = *at;
            if (depth == MAX_DEPTH) return false;
            at = json_space(at + 1, end);
            ended = at < end && *at == bracket + 2;
            if (!ended) {
                open[depth++] = bracket;
                continue;
            }
            at++;
        } else if (*at == '"') {
            const uint8_t *past = json_past_string(at, end);
            if (!past) return false;
            for (at++; at < past - 1; at++) {
                if (*at < 0x20) return false;
                if (*at == '\\' && !memchr("\"\\/bfnrtu", *++at, 9)) return false;
            }
            at = past;
        } else if (*at == '-' || (*at >= '0' && *at <= '9')) {
            if (!(at = json_past_number(at, end))) return false;
        } else {
            size_t word = 0;
            while (word < 3 && ((size_t)(end - at) < strlen(words[word]) ||
                                memcmp(at, words[word], strlen(words[word])) != 0)) {
                word++;
            }
            if (word == 3) return false;
            at += strlen(words[word]);
        }
        /* A value has ended. Its container continues after a comma, or ends too. */
        for (;;) {
            at = json_space(at, end);
            if (depth == 0) return at == end;
            if (at >= end) return false;
            if (*at == ',') {
                at++;
                break;
            }
            if (*at != open[depth - 1] + 2) return false;
            depth--;
            at++;
        }
    }
}

#endif
