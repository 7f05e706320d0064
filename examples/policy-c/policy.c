/* Validator that refuses lines that are too long or contain a control character.
 *
 * It reads lines as bytes and needs no JSON library. Built with wit-bindgen's C bindings and any
 * clang that targets wasm32; see README.md beside this file. */

#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "validator.h"

/* Maximum length of a line, in bytes. */
static uint64_t max_line_bytes = 65536;

/* JSON Schema of the settings. */
static const char SCHEMA[] =
    "{\"type\":\"object\",\"properties\":{\"max_line_bytes\":{\"type\":\"integer\",\"minimum\":1,"
    "\"description\":\"Maximum length of a line, in bytes; 65536 if absent\"}},"
    "\"additionalProperties\":false}";

void exports_batchwright_plugin_plugin_describe(
    exports_batchwright_plugin_plugin_description_t *ret) {
    memset(ret, 0, sizeof *ret);
    validator_string_dup(&ret->name, "line-length");
    validator_string_dup(&ret->version, "0.1.0");
    validator_string_dup(&ret->summary,
                         "Refuses lines that are too long or contain control characters");
    validator_string_dup(&ret->settings_schema, SCHEMA);
}

/* Reads the setting without a JSON parser. The settings fit the schema, so all digits belong to its
 * one number. */
bool exports_batchwright_plugin_plugin_configure(exports_batchwright_plugin_plugin_json_t *settings,
                                                 validator_string_t *err) {
    (void)err;
    uint64_t number = 0;
    bool found = false;
    for (size_t at = 0; at < settings->len; at++) {
        uint8_t byte = settings->ptr[at];
        if (byte < '0' || byte > '9') continue;
        found = true;
        if (number < UINT64_MAX / 16) number = number * 10 + (uint64_t)(byte - '0');
    }
    if (found) max_line_bytes = number;
    exports_batchwright_plugin_plugin_json_free(settings);
    return true;
}

/* Appends a violation. */
static void report(exports_batchwright_plugin_validation_list_violation_t *found, uint64_t line,
                   const char *code, const char *message) {
    exports_batchwright_plugin_validation_violation_t *grown =
        realloc(found->ptr, (found->len + 1) * sizeof *grown);
    if (!grown) abort();
    found->ptr = grown;
    exports_batchwright_plugin_validation_violation_t *violation = &found->ptr[found->len++];
    memset(violation, 0, sizeof *violation);
    violation->line = line;
    validator_string_dup(&violation->code, code);
    validator_string_dup(&violation->message, message);
}

void exports_batchwright_plugin_validation_validate(
    exports_batchwright_plugin_validation_batch_t *batch,
    exports_batchwright_plugin_validation_list_line_t *lines,
    exports_batchwright_plugin_validation_list_violation_t *ret) {
    ret->ptr = NULL;
    ret->len = 0;
    for (size_t index = 0; index < lines->len; index++) {
        const exports_batchwright_plugin_validation_line_t *line = &lines->ptr[index];
        if (line->text.len > max_line_bytes) {
            report(ret, line->number, "line_too_long",
                   "This line is longer than this server's policy allows.");
        }
        for (size_t at = 0; at < line->text.len; at++) {
            /* In valid JSON a control character is an escape: \u0000 to \u001f. After an escaped
             * backslash no other escape begins. */
            if (line->text.ptr[at] != '\\') continue;
            if (line->text.len - at >= 6 && !memcmp(line->text.ptr + at, "\\u00", 4) &&
                (line->text.ptr[at + 4] == '0' || line->text.ptr[at + 4] == '1')) {
                report(ret, line->number, "control_character",
                       "This line contains a control character.");
                break;
            }
            at++;
        }
    }
    exports_batchwright_plugin_validation_batch_free(batch);
    exports_batchwright_plugin_validation_list_line_free(lines);
}
