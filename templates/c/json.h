/* As much of JSON as a plugin needs: finds values in a text, without building or copying anything. A value that is not there, and what is found
 * in a text that is no JSON, is the empty span. Nothing calls itself, so depth costs no stack. */

#ifndef JSON_H
#define JSON_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* The text of one value; `ptr` is NULL if there is none. */
typedef struct {
    const uint8_t *ptr;
    size_t len;
} json_t;

static inline const uint8_t *json_space(const uint8_t *at, const uint8_t *end) {
    while (at < end && (*at == ' ' || *at == '\t' || *at == '\n' || *at == '\r')) at++;
    return at;
}

/* Past the string that begins here; NULL if it does not end. */
static inline const uint8_t *json_past_string(const uint8_t *at, const uint8_t *end) {
    for (at++; at < end; at++) {
        if (*at == '"') return at + 1;
        if (*at == '\\') at++;
    }
    return NULL;
}

/* Past the value that begins here; NULL if there is none. */
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
            while (at < end && !strchr(" \t\r\n,:{}[]\"", *at)) at++;
        }
        if (depth == 0) return at;
    }
}

/* Whether a value is this string, ASCII alone, however it is escaped. */
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

/* An object's member of this name; the last one, as most parsers have it. */
static inline json_t json_member(json_t object, const char *name) {
    json_t found = {NULL, 0};
    const uint8_t *at = object.ptr, *end = at + object.len;
    if (object.len == 0 || *(at = json_space(at, end)) != '{') return found;
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
        if (json_is(key, name)) found = (json_t){at, (size_t)(past - at)};
        at = json_space(past, end);
        if (at < end && *at == ',') at++;
    }
}

/* The next element of an array; `*at` is NULL for the first one. */
static inline json_t json_next(json_t array, const uint8_t **at) {
    const uint8_t *end = array.ptr + array.len, *begin = *at ? *at : array.ptr;
    json_t none = {NULL, 0};
    if (array.len == 0 || array.ptr[0] != '[') return none;
    begin = json_space(*at ? begin : begin + 1, end);
    if (begin < end && *begin == ',') begin = json_space(begin + 1, end);
    const uint8_t *past = begin < end && *begin != ']' ? json_past(begin, end) : NULL;
    if (!past) return none;
    *at = past;
    return (json_t){begin, (size_t)(past - begin)};
}

/* A value as a number, if it is one. */
static inline bool json_number(json_t value, double *number) {
    char digits[64], *end;
    if (value.len == 0 || value.len >= sizeof digits || !strchr("-0123456789", value.ptr[0])) return false;
    memcpy(digits, value.ptr, value.len);
    digits[value.len] = 0;
    *number = strtod(digits, &end);
    return *end == 0;
}

#endif
