//! Generates a clip and writes its frames as PPM pictures: `frames MODEL_DIR OUT_DIR PROMPT [SEED]`.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use kinoflock_inference::{Error, GenerateRequest, LoadOptions, Observer, StepEvent, load};

struct Printer(Instant);

impl Observer for Printer {
    fn step(&mut self, event: &StepEvent<'_>) {
        say(&format!("step {} of {} after {:.2?}", event.index + 1, event.total, self.0.elapsed()));
    }
}

fn say(line: &str) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, out, prompt, rest @ ..] = arguments.as_slice() else {
        say("usage: frames MODEL_DIR OUT_DIR PROMPT [SEED]");
        return ExitCode::from(2);
    };
    let seed = rest.first().and_then(|seed| seed.parse().ok()).unwrap_or(0);
    match run(Path::new(model), Path::new(out), prompt, seed) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&error.to_string());
            ExitCode::FAILURE
        }
    }
}

fn run(model: &Path, out: &Path, prompt: &str, seed: u64) -> Result<(), Error> {
    let start = Instant::now();
    let mut pipeline = load(model, &LoadOptions::default())?;
    say(&format!("loaded after {:.2?}", start.elapsed()));
    let request = GenerateRequest { seed, ..GenerateRequest::new(prompt, &pipeline.info().defaults) };
    let made = pipeline.generate(&request, &mut Printer(start))?;
    say(&format!("decoded after {:.2?}", start.elapsed()));
    let written = |source| Error::Read { file: out.to_owned(), source };
    std::fs::create_dir_all(out).map_err(written)?;
    for index in 0..made.frames.count {
        let mut picture = format!("P6\n{} {}\n255\n", made.frames.width, made.frames.height).into_bytes();
        picture.extend(made.frames.frame(index).unwrap_or_default());
        std::fs::write(out.join(format!("frame-{index:04}.ppm")), picture).map_err(written)?;
    }
    Ok(())
}
