// A reader of JSON, as much as artifact.json needs. Numbers are doubles; what is missing or of another kind throws.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

struct Json {
    enum Kind { Null, Boolean, Number, Text, List, Object } kind = Null;
    double number = 0;  // of a boolean: 0 or 1
    std::string text;
    std::vector<Json> items;
    std::map<std::string, Json> members;

    const Json& at(const std::string& key) const {
        const auto found = members.find(key);
        if (found == members.end()) throw std::runtime_error("there is no \"" + key + "\"");
        return found->second;
    }
    const Json& at(size_t place) const {
        if (place >= items.size()) throw std::runtime_error("a list is too short");
        return items[place];
    }
    double as_number() const { return need(Number), number; }
    const std::string& as_text() const { return need(Text), text; }
    bool is(const char* word) const { return kind == Text && text == word; }

    static Json parse(const std::string& source) {
        Parser parser{source.data(), source.data() + source.size(), 0};
        Json value = parser.value();
        parser.space();
        if (parser.here != parser.end) parser.fail();
        return value;
    }

private:
    void need(Kind wanted) const {
        if (kind != wanted) throw std::runtime_error("a value is of another kind");
    }

    struct Parser {
        const char *here, *end;
        int depth;

        [[noreturn]] void fail() const { throw std::runtime_error("it is no valid JSON"); }
        void space() {
            while (here != end && (*here == ' ' || *here == '\n' || *here == '\t' || *here == '\r')) here++;
        }
        bool take(char letter) {
            space();
            if (here == end || *here != letter) return false;
            here++;
            return true;
        }
        void expect(char letter) {
            if (!take(letter)) fail();
        }
        bool word(const std::string& wanted) {
            if (size_t(end - here) < wanted.size() || wanted.compare(0, wanted.size(), here, wanted.size()) != 0)
                return false;
            here += wanted.size();
            return true;
        }
        Json value() {
            if (++depth > 64) fail();  // no artifact.json is so deep, and the stack is finite
            Json made;
            space();
            if (here == end) fail();
            if (take('{')) {
                made.kind = Object;
                if (!take('}')) {
                    do {
                        space();
                        std::string key = string();
                        expect(':');
                        made.members[key] = value();
                    } while (take(','));
                    expect('}');
                }
            } else if (take('[')) {
                made.kind = List;
                if (!take(']')) {
                    do made.items.push_back(value());
                    while (take(','));
                    expect(']');
                }
            } else if (*here == '"') {
                made.kind = Text;
                made.text = string();
            } else if (word("true") || word("false")) {
                made.kind = Boolean;
                made.number = here[-2] == 'u';
            } else if (!word("null")) {
                made.kind = Number;
                const std::string digits(here, end);  // strtod asks for a terminated string
                char* after;
                made.number = std::strtod(digits.c_str(), &after);
                if (after == digits.c_str()) fail();
                here += after - digits.c_str();
            }
            depth--;
            return made;
        }
        std::string string() {
            std::string made;
            expect('"');
            while (true) {
                if (here == end) fail();
                const char letter = *here++;
                if (letter == '"') return made;
                if (letter != '\\') {
                    made += letter;
                    continue;
                }
                if (here == end) fail();
                const std::string escaped = "\"\\/bfnrt", meant = "\"\\/\b\f\n\r\t";
                const char which = *here++;
                if (const size_t place = escaped.find(which); place != std::string::npos) {
                    made += meant[place];
                } else if (which == 'u') {
                    uint32_t code = hexadecimal();
                    if (code >= 0xd800 && code < 0xdc00 && word("\\u"))  // two of them are one letter
                        code = 0x10000 + ((code - 0xd800) << 10) + (hexadecimal() - 0xdc00);
                    encode(made, code);
                } else {
                    fail();
                }
            }
        }
        uint32_t hexadecimal() {
            uint32_t code = 0;
            for (int digit = 0; digit < 4; digit++) {
                if (here == end) fail();
                const std::string digits = "0123456789abcdef";
                const size_t place = digits.find(char(*here | ('A' <= *here && *here <= 'F' ? 0x20 : 0)));
                if (place == std::string::npos) fail();
                code = 16 * code + uint32_t(place);
                here++;
            }
            return code;
        }
        static void encode(std::string& made, uint32_t code) {
            if (code < 0x80) {
                made += char(code);
            } else if (code < 0x800) {
                made += char(0xc0 | code >> 6);
                made += char(0x80 | (code & 0x3f));
            } else if (code < 0x10000) {
                made += char(0xe0 | code >> 12);
                made += char(0x80 | (code >> 6 & 0x3f));
                made += char(0x80 | (code & 0x3f));
            } else {
                made += char(0xf0 | code >> 18);
                made += char(0x80 | (code >> 12 & 0x3f));
                made += char(0x80 | (code >> 6 & 0x3f));
                made += char(0x80 | (code & 0x3f));
            }
        }
    };
};
