//! txn: every target and operator of a compare, quoting, both branches, and what is refused. At most four operations here.

use keelson_proto::etcdserverpb::TxnResponse;

use super::keys::FORMS;
use super::recorder::Recorder;

pub(super) fn tell(story: &mut Recorder) {
    story.run(&["put", "t", "1"]);
    branches(story);
    compares(story);
    quoting(story);
    forms(story);
    refusals(story);
}

fn branches(story: &mut Recorder) {
    for input in [
        "value(\"t\") = \"1\"\n\nput t 2\nget t\n\nput t 3\n\n",
        "value(\"t\") = \"1\"\n\nput t 2\n\nget t\ndel t\nget t\n\n",
        "mod(\"t\") > \"0\"\n\nput t 4\n\nput u 1\nput v 2\n\n",
        "version(\"u\") = \"1\"\ncreate(\"v\") > \"1\"\n\ndel u\ndel v\n\n\n",
        "\nput x 1 --prev-kv\nget x\nput y 2\ndel x --prev-kv\n\n\n",
        "\nput t/1 a\nput t/2 b\nput t/3 c\n\n\n",
        "\nget t/ --prefix --limit 1\nget t/ --prefix --keys-only\nget t/ --prefix --order DESCEND --sort-by VALUE\n\n\n",
        "\nget t/1 t/3 --rev 2\ndel t/ --prefix --prev-kv\nget t/1 --from-key --count-only\n\n\n",
        "\n\n\n",
        "value(\"nothing\") = \"\"\n\nget t\n\nput t no\n\n",
    ] {
        story.run_with(input, &["txn"]);
    }
    story.run_with("mod(\"t\") > \"0\"\n\nput t 5\n\nput t 6\n\n", &["txn", "-i"]);
    story.run_with("mod(\"t\") < \"0\"\n\nput t 5\n\nput t 6\nget t\n\n", &["txn", "--interactive"]);
}

fn compares(story: &mut Recorder) {
    // t has lived a few lives by now; what it is shows in every answer below.
    story.run(&["get", "t", "-w", "json"]);
    let granted = story.run(&["lease", "grant", "300"]);
    let lease = granted.split_whitespace().nth(1).unwrap_or("none").to_owned();
    story.run(&["put", "leased", "v", "--lease", &lease]);
    for target in ["version", "create", "mod"] {
        for operator in ["=", "!=", "<", ">"] {
            for number in ["0", "2", "999"] {
                let input = format!("{target}(\"t\") {operator} \"{number}\"\n\nget yes\n\nget t --keys-only\n\n");
                story.run_with(&input, &["txn"]);
            }
        }
    }
    for operator in ["=", "!=", "<", ">"] {
        for value in ["", "6", "7"] {
            let input = format!("value(\"t\") {operator} \"{value}\"\n\nget yes\n\nget t --keys-only\n\n");
            story.run_with(&input, &["txn"]);
        }
    }
    // The last makes etcdctl itself panic, in either version.
    for compare in
        ["ver(\"t\") > \"0\"", "c(\"t\") > \"0\"", "m(\"t\") > \"0\"", "val(\"t\") = \"6\"", "lease(\"t\") = \"0\""]
    {
        story.run_with(&format!("{compare}\n\nget yes\n\nget t --keys-only\n\n"), &["txn"]);
    }
    let input = format!("\nput leased w --lease {lease}\nput leased x --ignore-lease\nput t --ignore-value\n\n\n");
    story.run_with(&input, &["txn"]);
    story.run_with("\nput leased x --ignore-lease\nput t --ignore-value\n\n\n", &["txn"]);
    story.run(&["get", "leased", "-w", "fields"]);
}

fn quoting(story: &mut Recorder) {
    for input in [
        "\nget t \"\\x00\" --keys-only\nget \"\\x00\" \"\\x00\" --limit 2\nget t \"\"\n\n\n",
        "value(\"with space\") = \"a b\"\n\nget \"with space\"\n\nput \"with space\" \"a b\"\n\n",
        "value(\"with space\") = \"a b\"\n\nget \"with space\"\n\nput \"with space\" \"a b\"\n\n",
        "\nput 'single quoted' 'a \"b\" c'\nget 'single quoted'\n\n\n",
        "\nput \"new\\nline\" \"tab\\there \\x41\"\nget \"new\\nline\"\n\n\n",
        "  mod( \"t\") > \"0\"  \n\n\n\n",
        "  mod(\"t\")   >   \"0\"  \n\n  get   t  \n\n\n",
    ] {
        story.run_with(input, &["txn"]);
    }
}

fn forms(story: &mut Recorder) {
    for form in FORMS {
        story.run_with("mod(\"t\") > \"0\"\n\nput u 1 --prev-kv\nget u\ndel u --prev-kv\n\n\n", &["txn", "-w", form]);
        story.run_with("mod(\"t\") = \"0\"\n\n\nget t\ndel nothing\n\n", &["txn", "-w", form, "--hex"]);
        story.run_with("mod(\"t\") = \"0\"\n\nget t\n\n\n", &["txn", "-w", form]);
    }
    story.message_with::<TxnResponse>("\nput u 1 --prev-kv\nget u\ndel u --prev-kv\n\n\n", &["txn", "-w", "protobuf"]);
}

fn refusals(story: &mut Recorder) {
    for input in [
        "\nput x 1\nput x 2\n\n\n",
        "\nput x 1\ndel x\n\n\n",
        "\nput x/1 1\ndel x/ --prefix\n\n\n",
        "\nput \"\" 1\n\n\n",
        "\nget \"\"\n\n\n",
        "value(\"\") = \"\"\n\n\n\n",
        "\nput a 1\nput b 2\nput c 3\nput d 4\nput e 5\n\n\n",
        "\nput only-a-key --ignore-value\n\n\n",
        "\nput k v --ignore-value\n\n\n",
        "\nput k v --lease 1234abcd\n\n\n",
        "\nget t --rev 100000\n\n\n",
        "\nput kept 1\nget t --rev 100000\n\n\n",
        "nonsense\n\n\n\n",
        "colour(\"t\") = \"red\"\n\n\n\n",
        "mod(\"t\") ~ \"1\"\n\n\n\n",
        "mod(\"t\") > \"one\"\n\n\n\n",
        "mod(t) > 1\n\n\n\n",
        "\nfetch t\n\n\n",
        "\nget\n\n\n",
        "\nget t --unheard-of\n\n\n",
        "\nput t",
        "",
    ] {
        story.run_with(input, &["txn"]);
    }
    story.run(&["txn", "an argument"]);
    story.run(&["get", "", "--prefix"]);
}
