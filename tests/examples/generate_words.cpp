// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Tokenizers and evaluation episodes of kvkeep-generate.
#include "../support/catch.hpp"
#include "generate/episodes.hpp"
#include "generate/file.hpp"
#include "generate/sha256.hpp"
#include "generate_models.hpp"

using namespace kvkeep;
using namespace kvkeep::test;
using generate::bad_input;

TEST_CASE("words are found whole, apart at signs, and by name when unknown") {
  generate::word_tokenizer const t(
      {"<pad>", "<bos>", "<end>", "day", "12", ":", "walk", "the", "dog", ".", "12:00", "(", ")"});
  CHECK(t.encode("Day 12: walk the dog.") == std::vector<index_t>{3, 4, 5, 6, 7, 8, 9});
  CHECK(t.encode("<BOS> 12:00 (dog)") == std::vector<index_t>{1, 10, 11, 8, 12});
  CHECK(t.encode("  ").empty());
  std::string text;
  index_t last = -1;
  for (index_t const id : {3, 4, 5, 6, 7, 8, 9, 2, 11, 8, 12}) {
    text += t.decode(id, last);
    last = id;
  }
  CHECK(text == "day 12: walk the dog. (dog)");
  CHECK_THROWS_WITH(t.encode("the cat."), "the prompt: cat: not a word of the model");
}

TEST_CASE("pieces are merged by score, and bytes stand in for what has no piece") {
  generate::piece_vocabulary v;
  v.pieces = {"<unk>", "<s>", "</s>", " ",      "a",      "b",
              "ab",    " a",  " ab",  "<0xC3>", "<0xA9>", "<0x0A>"};
  v.scores = {0, 0, 0, -9, -9, -9, -1, -2, -3, 0, 0, 0};
  generate::piece_tokenizer const t(v);
  CHECK(t.encode("ab") == std::vector<index_t>{8});  // " " "ab", then " ab"
  CHECK(t.encode("aab") == std::vector<index_t>{7, 6});
  CHECK(t.encode("\xc3\xa9") == std::vector<index_t>{3, 9, 10});
  CHECK(t.encode("").empty());
  CHECK_THROWS_AS(t.encode("z"), bad_input);
  CHECK(t.decode(8, 1) == "ab");
  CHECK(t.decode(8, 5) == " ab");
  CHECK(t.decode(11, 5) == "\n");
}

TEST_CASE("episodes are checked, found by name and scored") {
  model_folder const tmp;
  std::string const good = R"({"schema":1,"vocabulary_sha256":"x","episodes":[
    {"task":"diary","seed":1,"prompt":[1,2],"response":[5,6,7,8,9],
     "checks":[{"kind":"once","entry":1,"depth":-1,"at":3,"n":2,"anchor":[6,7]}]},
    {"task":"diary","seed":2,"prompt":[1],"response":[4],"checks":[]}]})";
  auto const set = generate::load_episodes(tmp.write("e.json", good), 10);
  CHECK(generate::find_episode(set, "diary:1").seed == 2);
  auto const& e = generate::find_episode(set, "diary");
  CHECK(e.seed == 1);
  auto const freely = [&](std::vector<index_t> const& w) {
    return generate::holds_freely(e, e.checks[0], w);
  };
  CHECK(freely({3, 3, 6, 7, 8, 9}));
  CHECK(!freely({3, 3, 6, 7, 8}));
  CHECK(!freely({6, 7, 8, 1}));
  CHECK(!freely({8, 9}));
  CHECK(generate::holds_forced(e, e.checks[0], std::vector<index_t>{0, 0, 0, 8, 9}));
  CHECK(!generate::holds_forced(e, e.checks[0], std::vector<index_t>{5, 6, 7, 8, 0}));
  CHECK_THROWS_WITH(generate::find_episode(set, "walk"), "--task: walk: expected one of diary");
  CHECK_THROWS_WITH(generate::find_episode(set, "diary:2"), "--task: diary:2: expected diary:0..1");
  CHECK_THROWS_AS(generate::find_episode(set, "diary:x"), bad_input);
  auto const changed = [&](std::string const& from, std::string const& to) {
    std::string s = good;
    s.replace(s.find(from), from.size(), to);
    std::string what = "not refused";
    try {
      generate::load_episodes(tmp.write("e.json", s), 10);
    } catch (bad_input const& x) {
      what = x.what();
    }
    return what.substr(what.find("e.json"));
  };
  CHECK(changed("\"schema\":1", "\"schema\":2") == "e.json: schema: 2, expected 1..1");
  CHECK(changed("[5,6,7,8,9]", "[5,10]") ==
        "e.json: episodes[0].response: 10, expected token ids 0..9");
  CHECK(changed("\"n\":2", "\"n\":3") == "e.json: episodes[0].checks[0].n: 3, expected 1..2");
  CHECK(changed("\"anchor\"", "\"ancor\"") == "e.json: episodes[0].checks[0].anchor: missing");
  CHECK(changed("{\"schema\"", "{{") == "e.json: json: malformed");
}

TEST_CASE("sha256 of the standard's examples") {
  using generate::sha256;
  CHECK(sha256("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  CHECK(sha256("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  CHECK(sha256("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq") ==
        "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
}
