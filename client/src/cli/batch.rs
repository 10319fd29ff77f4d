//! `kinoflock generate --batch jobs.jsonl`: every line is a job, with the flags of `generate` as names.
//!
//! A line's job is found again in the store by what the line says, so a process that was killed is simply started again:
//! what is done is not made twice, what is under way is followed. All lines are read before anything is sent.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Parser;
use serde::Serialize;
use serde_json::{Map, Value};

use super::args::{Cli, Command, Generate};
use super::context::Context;
use super::failure::Failure;
use super::many::{self, Manner, Outcome, Task};
use super::{audit, generate};
use crate::ask::Ask;
use crate::output::many::Label;
use crate::output::table::{self, Column};
use crate::store::BatchKey;

/// Greatest batch file that is read, in bytes (16 MiB).
const MAX_FILE: u64 = 16 << 20;
/// Most jobs of one batch.
const MAX_LINES: usize = 10_000;
/// Wrong lines that are told; the others are counted.
const MAX_TOLD: usize = 50;
/// A wrong name within so many changes of a known one is taken for it.
const NEAR: usize = 3;
/// What a line may say: flags of `generate`, as written or with `_`.
const KEYS: &[&str] = &[
    "prompt",
    "prompt-file",
    "model",
    "negative",
    "seed",
    "frames",
    "seconds",
    "size",
    "fps",
    "steps",
    "guidance",
    "image",
    "end-image",
    "keyframe",
    "init-latents",
    "extend",
    "lora",
    "set",
    "collective",
    "latents",
    "licence",
    "require-terms",
    "custodians",
    "share",
    "output",
    "with-prompt",
    "bare",
    "guidance-curve",
    "mix-prompt",
    "mix-seed",
    "mix-weight",
    "skip-layers",
    "repeat-layers",
    "permute-channels",
    "scale-channels",
    "shift-channels",
    "channels-after",
    "return-noise",
    "return-steps",
    "start-step",
    "strength",
];

/// A line that can become a job.
#[derive(Debug)]
struct Line {
    number: usize,
    args: Generate,
    key: BatchKey,
}

#[derive(Serialize)]
struct Row<'a> {
    event: &'static str,
    line: &'a Label,
    seed: Option<String>,
    node: Option<String>,
    took_ms: Option<u64>,
    file: Option<&'a Path>,
    error: Option<&'a str>,
}

pub(super) async fn run(file: &Path, args: &Generate, context: &Context<'_>) -> Result<(), Failure> {
    let lines = read(file)?;
    let mut tasks = tasks(lines, args, context).map_err(|wrong| refuse(file, &wrong))?;
    let client = context.client().await?;
    let (ways, pinned) = context.ways(&client, &args.at)?;
    let known = client.batch_jobs()?;
    for task in &mut tasks {
        task.ask.pinned = pinned;
        task.before = task.key.as_ref().and_then(|key| known.get(key)).cloned();
    }
    let before = tasks.iter().filter(|task| task.before.is_some()).count();
    if before > 0 {
        let text =
            format!("{before} of {} jobs were handed over before; they are not made again", tasks.len());
        context.out.words(&text);
    }
    let manner = Manner {
        ways: &ways,
        in_flight: args.in_flight as usize,
        timeout: args.timeout,
        left: "the same command goes on with the batch",
    };
    let started = Instant::now();
    let outcomes = many::run(&tasks, &manner, context, &client).await?;
    audit::after_many(&client, many::jobs_of(&outcomes), context).await;
    client.stop().await;
    report(&tasks, &outcomes, context);
    many::summary(&tasks, &outcomes, started, context)
}

fn report(tasks: &[Task], outcomes: &[Outcome], context: &Context<'_>) {
    let columns = [
        Column::Left("line"),
        Column::Right("seed"),
        Column::Left("node"),
        Column::Right("time"),
        Column::Left("file"),
    ];
    let mut rows = Vec::new();
    for Outcome { index, made } in outcomes {
        let label = &tasks[*index].label;
        let (cells, row) = match made {
            Ok(made) => {
                let file = made.file.as_deref().unwrap_or(Path::new("-"));
                let (seed, node, took) =
                    (made.seed.to_string(), Some(made.node.to_string()), Some(made.took.0));
                let cells = [seed.clone(), made.by(), made.took.to_string(), file.display().to_string()];
                (
                    cells,
                    Row {
                        event: "line",
                        line: label,
                        seed: Some(seed),
                        node,
                        took_ms: took,
                        file: Some(file),
                        error: None,
                    },
                )
            }
            Err(failure) => {
                let reason = failure.text.lines().next().unwrap_or_default();
                let none = || "-".to_owned();
                let cells = [none(), none(), none(), format!("failed: {reason}")];
                let error = Some(failure.text.as_str());
                (
                    cells,
                    Row {
                        event: "line",
                        line: label,
                        seed: None,
                        node: None,
                        took_ms: None,
                        file: None,
                        error,
                    },
                )
            }
        };
        context.out.record(&row);
        rows.push([vec![label.to_string().trim_start_matches("line ").to_owned()], cells.to_vec()].concat());
    }
    for line in table::lines(&columns, &rows) {
        context.out.words(&line);
    }
}

/// The lines as jobs, or what is wrong with them.
fn tasks(lines: Vec<Line>, args: &Generate, context: &Context<'_>) -> Result<Vec<Task>, Vec<String>> {
    let (mut tasks, mut wrong) = (Vec::new(), Vec::new());
    let mut places: BTreeMap<PathBuf, usize> = BTreeMap::new();
    for Line { number, args: mut line, key } in lines {
        line.model = line.model.or_else(|| args.model.clone());
        line.require_terms |= args.require_terms;
        if let Some(output) = &line.save.output
            && let Some(other) = places.insert(output.clone(), number)
        {
            wrong.push(format!("line {number}: {} is the output of line {other} too", output.display()));
        }
        match task(number, line, key, context) {
            Ok(task) => tasks.push(task),
            Err(failure) => wrong.push(format!("line {number}: {}", failure.text)),
        }
    }
    if wrong.is_empty() { Ok(tasks) } else { Err(wrong) }
}

fn task(number: usize, line: Generate, key: BatchKey, context: &Context<'_>) -> Result<Task, Failure> {
    generate::refuse_what_is_not_there(&line)?;
    generate::check_place(&line.save, context)?;
    if line.save.output.as_deref() == Some(Path::new("-")) {
        return Err(Failure::usage("output: standard output is one place for several clips"));
    }
    let ask: Ask = generate::ask(&line, context)?;
    ask.check()?;
    Ok(Task { label: Label::Line(number), ask, save: line.save, key: Some(key), before: None })
}

fn read(file: &Path) -> Result<Vec<Line>, Failure> {
    let fault = |error: std::io::Error| Failure::file("read", file, &error);
    let given = fs::metadata(file).map_err(fault)?.len();
    if given > MAX_FILE {
        let shown = file.display();
        return Err(Failure::usage(format!("{shown} has {given} bytes, a batch may have {MAX_FILE}")));
    }
    let (text, place) = (fs::read_to_string(file).map_err(fault)?, fs::canonicalize(file).map_err(fault)?);
    parse(&text, &place).map_err(|wrong| refuse(file, &wrong))
}

fn refuse(file: &Path, wrong: &[String]) -> Failure {
    let told: String = wrong.iter().take(MAX_TOLD).map(|line| format!("\n  {line}")).collect();
    let more = wrong.len().saturating_sub(MAX_TOLD);
    let more = if more > 0 { format!("\n  and {more} more") } else { String::new() };
    Failure::usage(format!("{} is no batch yet, nothing was sent:{told}{more}", file.display()))
}

fn parse(text: &str, place: &Path) -> Result<Vec<Line>, Vec<String>> {
    let (mut lines, mut wrong) = (Vec::new(), Vec::new());
    let mut alike: BTreeMap<String, u64> = BTreeMap::new();
    for (number, line) in (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty()) {
        match parse_line(line) {
            Ok((args, said)) => {
                let number_of_its_like = alike.entry(said.clone()).or_default();
                let key = BatchKey::of(place, &said, *number_of_its_like);
                *number_of_its_like += 1;
                lines.push(Line { number, args, key });
            }
            Err(why) => wrong.push(format!("line {number}: {why}")),
        }
    }
    match lines.len() {
        _ if !wrong.is_empty() => Err(wrong),
        0 => Err(vec!["there is no line in it, such as {\"prompt\": \"night train\"}".to_owned()]),
        given if given > MAX_LINES => Err(vec![format!("{given} lines exceed the limit of {MAX_LINES}")]),
        _ => Ok(lines),
    }
}

/// A line as the arguments that it stands for, and what it says in one form whatever its spaces.
fn parse_line(line: &str) -> Result<(Generate, String), String> {
    let fields: Map<String, Value> = serde_json::from_str(line)
        .map_err(|error| format!("no JSON object such as {{\"prompt\": \"night train\"}}: {error}"))?;
    let mut arguments = vec!["kinoflock".to_owned(), "generate".to_owned()];
    let mut prompt = None;
    for (name, value) in &fields {
        let flag = name.replace('_', "-");
        if !KEYS.contains(&flag.as_str()) {
            return Err(unknown(name));
        }
        if flag == "prompt" {
            prompt = Some(value.as_str().ok_or("prompt: not a text")?.to_owned());
        } else {
            arguments
                .extend(argument(&flag, value).ok_or_else(|| format!("{name}: {value} is no value for it"))?);
        }
    }
    match prompt {
        Some(prompt) => arguments.extend(["--".to_owned(), prompt]),
        None if fields.keys().any(|name| name.replace('_', "-") == "prompt-file") => {}
        None => return Err("the prompt is missing".to_owned()),
    }
    let said = Value::Object(fields).to_string();
    match Cli::try_parse_from(arguments).map(|cli| cli.command) {
        Ok(Command::Generate(args)) => Ok((*args, said)),
        Ok(_) => Err("it asks for no clip".to_owned()),
        Err(error) => {
            let text = error.to_string();
            let first = text.lines().next().unwrap_or_default();
            Err(first.strip_prefix("error: ").unwrap_or(first).to_owned())
        }
    }
}

/// A field as a flag; none if such a value cannot be one.
fn argument(flag: &str, value: &Value) -> Option<Vec<String>> {
    let plain = |value: &Value| match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(value) => Some(value.to_string()),
        _ => None,
    };
    match value {
        Value::Null | Value::Bool(false) => Some(Vec::new()),
        Value::Bool(true) => Some(vec![format!("--{flag}")]),
        Value::Array(values) => {
            values.iter().map(|value| Some(format!("--{flag}={}", plain(value)?))).collect()
        }
        Value::Object(values) if flag == "set" => {
            values.iter().map(|(key, value)| Some(format!("--set={key}={}", plain(value)?))).collect()
        }
        value => Some(vec![format!("--{flag}={}", plain(value)?)]),
    }
}

fn unknown(name: &str) -> String {
    let wanted = name.replace('_', "-");
    let distance = |key: &&&str| strsim::damerau_levenshtein(key, &wanted);
    let nearest = KEYS.iter().min_by_key(distance).filter(|key| distance(key) <= NEAR);
    nearest.map_or_else(
        || format!("unknown name {name:?}; known are {}", KEYS.join(", ")),
        |key| format!("unknown name {name:?}; did you mean {key:?}?"),
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn parsed(text: &str) -> Result<Vec<Line>, Vec<String>> {
        parse(text, Path::new("/jobs.jsonl"))
    }

    #[test]
    fn a_line_says_what_the_flags_say() {
        let text = "{\"prompt\": \"-- a train\", \"seed\": 7, \"size\": \"768x512\", \"guidance\": -1.5, \
                    \"require_terms\": true, \"latents\": false, \"set\": {\"decode_tile\": 4}, \"output\": \"a.mp4\"}\n\n";
        let [line] = &parsed(text).unwrap()[..] else { panic!("one line") };
        let args = &line.args;
        assert_eq!(args.prompt.as_deref(), Some("-- a train"));
        assert_eq!((args.seed, args.size), (Some(7), Some((768, 512))));
        assert_eq!(args.guidance.unwrap().to_string(), "-1.5");
        assert!(args.require_terms && !args.latents);
        assert_eq!(args.set[0].0, "decode_tile");
        assert_eq!(args.save.output.as_deref(), Some(Path::new("a.mp4")));
    }

    #[test]
    fn a_line_may_say_what_happens_inside_the_run() {
        for name in crate::cli::touch::NAMES {
            assert!(KEYS.contains(&name.replace('_', "-").as_str()), "{name}");
        }
        let text =
            "{\"prompt\": \"x\", \"guidance_curve\": [8, -1.5], \"return_noise\": true, \"return_steps\": 3}";
        let touch = &parsed(text).unwrap()[0].args.touch;
        assert_eq!(touch.guidance_curve.iter().map(ToString::to_string).collect::<Vec<_>>(), ["8", "-1.5"]);
        assert!(touch.return_noise && touch.return_steps == [3]);
    }

    #[test]
    fn all_wrong_lines_are_told_with_their_numbers_and_the_nearest_name() {
        let text = "{\"prompt\": \"x\"}\n{\"promt\": \"x\"}\n\nnonsense\n{\"seed\": 7}\n\
                    {\"prompt\": \"x\", \"frames\": \"many\"}\n{\"prompt\": \"x\", \"size\": [1, {}]}\n";
        let wrong = parsed(text).unwrap_err();
        let expected = [
            "line 2: unknown name \"promt\"; did you mean \"prompt\"?",
            "line 4: no JSON object",
            "line 5: the prompt is missing",
            "line 6: invalid value 'many' for '--frames",
            "line 7: size: [1,{}] is no value for it",
        ];
        assert_eq!(wrong.len(), expected.len(), "{wrong:?}");
        for (line, expected) in wrong.iter().zip(expected) {
            assert!(line.starts_with(expected), "{line}");
        }
        assert!(parsed("\n").is_err());
    }

    #[test]
    fn a_line_keeps_its_key_wherever_it_stands_and_equal_lines_have_their_own() {
        let keys = |text: &str| parsed(text).unwrap().into_iter().map(|line| line.key).collect::<Vec<_>>();
        let two = keys("{\"prompt\":\"a\",\"seed\":1}\n{\"prompt\":\"a\",\"seed\":1}\n");
        assert_ne!(two[0], two[1]);
        let moved = keys("{\"prompt\":\"b\"}\n\n{\"seed\": 1, \"prompt\": \"a\"}\n");
        assert_eq!(moved[1], two[0]);
        assert_ne!(parse("{\"prompt\":\"b\"}", Path::new("/other")).unwrap()[0].key, moved[0]);
    }
}
