//! Which program runs a script: its `#!` line if that program exists, else by extension.
//!
//! Follows `_get_interpreter` of LMCache's `v1/plugin/runtime_plugin_launcher.py`, except
//! that a `#!` line with arguments or with `env` is understood and not passed over.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io::Read,
    os::unix::{
        ffi::OsStrExt,
        fs::{MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
};

use super::error::ScriptError;

/// A longer `#!` line is passed over; the kernel itself cuts at 256 bytes.
const MAX_FIRST_LINE_BYTES: u64 = 4096;

/// What to execute for a script: a program and its arguments, the script's path among them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct CommandLine {
    pub(super) program: PathBuf,
    pub(super) arguments: Vec<OsString>,
    /// The program that the script asked for and that does not exist here.
    pub(super) missing: Option<String>,
}

/// Finds the program for `script`, looking for bare names along `search_path` (as in `PATH`).
pub(super) fn resolve(script: &Path, search_path: &OsStr) -> Result<CommandLine, ScriptError> {
    let (first_line, is_executable) = read_first_line(script)?;
    let mut tried = Vec::new();
    if let Some(words) = first_line.as_deref().and_then(shebang_words) {
        match find_requested(&words, search_path) {
            Some((program, options)) => {
                let mut arguments = options;
                arguments.push(script.as_os_str().to_owned());
                return Ok(CommandLine {
                    program,
                    arguments,
                    missing: None,
                });
            }
            None => tried.push(words.join(" ")),
        }
    }
    let fallbacks: &[&str] = match script.extension().and_then(OsStr::to_str) {
        Some("py") => &["python3", "python"],
        Some("sh") => &["bash"],
        _ if tried.is_empty() && is_executable => {
            return Ok(CommandLine {
                program: script.to_owned(),
                arguments: Vec::new(),
                missing: None,
            });
        }
        _ => &[],
    };
    let missing = tried.first().cloned();
    for name in fallbacks {
        if let Some(program) = find_program(name, search_path) {
            return Ok(CommandLine {
                program,
                arguments: vec![script.as_os_str().to_owned()],
                missing,
            });
        }
        tried.push((*name).to_owned());
    }
    let path = script.to_owned();
    if tried.is_empty() {
        return Err(ScriptError::UnknownKind { path });
    }
    let tried: Vec<String> = tried.iter().map(|name| format!("`{name}`")).collect();
    Err(ScriptError::NoInterpreter {
        path,
        tried: tried.join(", "),
    })
}

/// The first line, and whether the file may be executed as it is.
fn read_first_line(script: &Path) -> Result<(Option<Vec<u8>>, bool), ScriptError> {
    let unreadable = |cause| ScriptError::Unreadable {
        path: script.to_owned(),
        cause,
    };
    let file = File::options()
        .read(true)
        // A named pipe would otherwise be waited for.
        .custom_flags(rustix::fs::OFlags::NONBLOCK.bits().cast_signed())
        .open(script)
        .map_err(unreadable)?;
    let metadata = file.metadata().map_err(unreadable)?;
    if !metadata.is_file() {
        return Err(ScriptError::NotAFile {
            path: script.to_owned(),
        });
    }
    let mut start = Vec::new();
    file.take(MAX_FIRST_LINE_BYTES)
        .read_to_end(&mut start)
        .map_err(unreadable)?;
    let is_whole = (start.len() as u64) < MAX_FIRST_LINE_BYTES;
    let line = match start.iter().position(|&byte| byte == b'\n') {
        Some(end) => start.get(..end).map(<[u8]>::to_vec),
        None => is_whole.then_some(start),
    };
    Ok((line, metadata.mode() & 0o111 != 0))
}

/// The words after `#!`; `None` for a line without any.
fn shebang_words(line: &[u8]) -> Option<Vec<String>> {
    let text = std::str::from_utf8(line.strip_prefix(b"#!")?).ok()?;
    let words: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
    (!words.is_empty()).then_some(words)
}

/// The program that a `#!` line means and the arguments before the script's path.
///
/// The kernel passes all after the interpreter as one argument; here it is split at white
/// space, which is what the author of `#!/usr/bin/env python3 -u` wants.
fn find_requested(words: &[String], search_path: &OsStr) -> Option<(PathBuf, Vec<OsString>)> {
    let (interpreter, arguments) = words.split_first()?;
    if Path::new(interpreter).file_name() == Some(OsStr::new("env")) {
        return find_behind_env(interpreter, arguments, search_path);
    }
    let program = find_program(interpreter, search_path)?;
    Some((program, arguments.iter().map(OsString::from).collect()))
}

/// `env [-S] NAME ARGUMENT...` is looked up here, so that a missing NAME is noticed before
/// the start. With assignments or other options `env` itself runs, if it exists.
fn find_behind_env(
    env: &str,
    arguments: &[String],
    search_path: &OsStr,
) -> Option<(PathBuf, Vec<OsString>)> {
    let mut words = split_string(arguments)?;
    let is_plain = |word: &String| !word.starts_with('-') && !word.contains('=');
    if words.first().is_some_and(is_plain) {
        let name = words.remove(0);
        let program = find_program(&name, search_path)?;
        return Some((program, words.into_iter().map(OsString::from).collect()));
    }
    let mut rest = words.iter();
    let name = loop {
        match rest.next()? {
            // These take the next word as their value.
            option if matches!(option.as_str(), "-u" | "--unset" | "-C" | "--chdir") => {
                rest.next()?;
            }
            word if is_plain(word) => break word,
            _ => {}
        }
    };
    find_program(name, search_path)?;
    let program = find_program(env, search_path)?;
    Some((program, words.into_iter().map(OsString::from).collect()))
}

/// The words after `env`, with its `-S` taken out and quotes within it resolved.
/// `None` when a quote is not closed.
fn split_string(arguments: &[String]) -> Option<Vec<String>> {
    let Some((first, rest)) = arguments.split_first() else {
        return Some(Vec::new());
    };
    let head = ["--split-string=", "--split-string", "-S"]
        .iter()
        .find_map(|option| first.strip_prefix(option));
    let Some(head) = head else {
        return Some(arguments.to_vec());
    };
    let mut text = head.to_owned();
    for word in rest {
        text.push(' ');
        text.push_str(word);
    }
    split_quoted(&text)
}

fn split_quoted(text: &str) -> Option<Vec<String>> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quote = None;
    let mut characters = text.chars();
    while let Some(character) = characters.next() {
        match (quote, character) {
            (Some(open), _) if character == open => quote = None,
            (None, '\'' | '"') => {
                quote = Some(character);
                word.get_or_insert_default();
            }
            (None | Some('"'), '\\') => word.get_or_insert_default().push(characters.next()?),
            (None, _) if character.is_whitespace() => words.extend(word.take()),
            _ => word.get_or_insert_default().push(character),
        }
    }
    words.extend(word);
    quote.is_none().then_some(words)
}

/// A path as it is, a bare name along `search_path`; only executable files count.
pub(super) fn find_program(name: &str, search_path: &OsStr) -> Option<PathBuf> {
    let is_executable = |path: &Path| {
        std::fs::metadata(path).is_ok_and(|metadata| metadata.is_file())
            && rustix::fs::access(path, rustix::fs::Access::EXEC_OK).is_ok()
    };
    if name.contains('/') {
        let path = std::path::absolute(name).ok()?;
        return is_executable(&path).then_some(path);
    }
    search_path
        .as_bytes()
        .split(|&byte| byte == b':')
        // An empty or relative entry would make the answer depend on the directory.
        .map(|directory| Path::new(OsStr::from_bytes(directory)))
        .filter(|directory| directory.is_absolute())
        .map(|directory| directory.join(name))
        .find(|path| is_executable(path))
}

#[cfg(test)]
mod tests {
    #![allow(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        reason = "a test fails by panicking"
    )]

    use std::{fs, os::unix::fs::PermissionsExt};

    use super::*;

    /// A directory with `bin/` as the search path, where only the given programs exist.
    struct Machine {
        directory: tempfile::TempDir,
    }

    impl Machine {
        fn with(programs: &[&str]) -> Self {
            let directory = tempfile::tempdir().unwrap();
            fs::create_dir(directory.path().join("bin")).unwrap();
            for program in programs {
                let path = directory.path().join("bin").join(program);
                fs::write(&path, "").unwrap();
                fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
            }
            Self { directory }
        }

        fn bin(&self, name: &str) -> String {
            let path = self.directory.path().join("bin").join(name);
            path.to_str().unwrap().to_owned()
        }

        fn script(&self, name: &str, text: impl AsRef<[u8]>) -> PathBuf {
            let path = self.directory.path().join(name);
            fs::write(&path, text).unwrap();
            path
        }

        fn resolve(&self, script: &Path) -> Result<CommandLine, ScriptError> {
            let search_path = format!("relative::{}", self.bin(""));
            resolve(script, OsStr::new(&search_path))
        }

        /// The command line in words, with `BIN/` for the search path and `SCRIPT` for the file.
        fn shown(&self, name: &str, text: impl AsRef<[u8]>) -> String {
            let script = self.script(name, text);
            let command = match self.resolve(&script) {
                Ok(command) => command,
                Err(error) => return error.to_string(),
            };
            let mut words = vec![command.program.to_str().unwrap().to_owned()];
            words.extend(
                command
                    .arguments
                    .iter()
                    .map(|word| format!("[{}]", word.to_str().unwrap())),
            );
            if let Some(missing) = command.missing {
                words.push(format!("(no {missing})"));
            }
            words
                .join(" ")
                .replace(&self.bin(""), "BIN/")
                .replace(script.to_str().unwrap(), "SCRIPT")
        }
    }

    #[test]
    fn the_first_line_is_honoured_in_all_its_forms() {
        let machine = Machine::with(&["python3", "bash", "awk", "env"]);
        let bin = |text: &str| text.replace("BIN/", &machine.bin(""));
        for (first_line, expected) in [
            ("#!/usr/bin/env python3", "BIN/python3 [SCRIPT]"),
            ("#!/usr/bin/env python3 -u", "BIN/python3 [-u] [SCRIPT]"),
            ("#!/usr/bin/env -S python3 -u", "BIN/python3 [-u] [SCRIPT]"),
            ("#!/usr/bin/env -Spython3 -u", "BIN/python3 [-u] [SCRIPT]"),
            (
                "#!/usr/bin/env --split-string=python3 -X 'a b'",
                "BIN/python3 [-X] [a b] [SCRIPT]",
            ),
            (
                r#"#!/usr/bin/env -S python3 "a \" b" c\ d"#,
                r#"BIN/python3 [a " b] [c d] [SCRIPT]"#,
            ),
            (
                "#!BIN/env -S A=1 python3 -u",
                "BIN/env [A=1] [python3] [-u] [SCRIPT]",
            ),
            (
                "#!BIN/env -u A python3",
                "BIN/env [-u] [A] [python3] [SCRIPT]",
            ),
            ("#! BIN/bash -e  -u\t", "BIN/bash [-e] [-u] [SCRIPT]"),
            ("#!BIN/awk -f", "BIN/awk [-f] [SCRIPT]"),
            ("#!python3 -u", "BIN/python3 [-u] [SCRIPT]"),
            ("#!/usr/bin/env python3 -u\r", "BIN/python3 [-u] [SCRIPT]"),
        ] {
            for (name, ending) in [("a.py", "\nbody"), ("a.sh", ""), ("a", "\n")] {
                let text = bin(first_line) + ending;
                assert_eq!(
                    machine.shown(name, &text),
                    expected,
                    "{first_line} in {name}"
                );
            }
        }
    }

    #[test]
    fn a_missing_interpreter_falls_back_by_extension() {
        let machine = Machine::with(&["python3", "python", "bash"]);
        for (name, text, expected) in [
            ("a.py", "", "BIN/python3 [SCRIPT]"),
            ("a.sh", "echo", "BIN/bash [SCRIPT]"),
            ("a.py", "#!\n", "BIN/python3 [SCRIPT]"),
            (
                "a.py",
                "#!/nowhere/python3.7 -u\n",
                "BIN/python3 [SCRIPT] (no /nowhere/python3.7 -u)",
            ),
            (
                "a.sh",
                "#!/usr/bin/env zsh\n",
                "BIN/bash [SCRIPT] (no /usr/bin/env zsh)",
            ),
            (
                "a.sh",
                "#!/usr/bin/env\n",
                "BIN/bash [SCRIPT] (no /usr/bin/env)",
            ),
            (
                "a.sh",
                "#!/usr/bin/env -S 'open\n",
                "BIN/bash [SCRIPT] (no /usr/bin/env -S 'open)",
            ),
            ("a.py", "#!/\n", "BIN/python3 [SCRIPT] (no /)"),
        ] {
            assert_eq!(machine.shown(name, text), expected, "{text:?} in {name}");
        }
        let only_python = Machine::with(&["python"]);
        assert_eq!(only_python.shown("a.py", ""), "BIN/python [SCRIPT]");
        assert_eq!(
            machine.shown("a.py", b"#!\xff\xfe\n"),
            "BIN/python3 [SCRIPT]"
        );
        assert_eq!(
            machine.shown("a.py", "#!".to_owned() + &" ".repeat(9000) + "bash"),
            "BIN/python3 [SCRIPT]"
        );
    }

    #[test]
    fn without_an_interpreter_the_error_names_the_file_and_the_way_out() {
        let machine = Machine::with(&[]);
        for (name, text, expected) in [
            (
                "a.py",
                "#!/nowhere/py\n",
                "`/nowhere/py`, `python3`, `python` not found in PATH",
            ),
            ("a.sh", "", "`bash` not found in PATH"),
            (
                "a.rb",
                "#!/usr/bin/env ruby\n",
                "`/usr/bin/env ruby` not found in PATH",
            ),
            ("a.txt", "", "make it executable"),
        ] {
            let shown = machine.shown(name, text);
            assert!(shown.contains(expected), "{shown}");
            assert!(shown.contains(name), "{shown}");
        }
    }

    #[test]
    fn an_executable_without_a_first_line_runs_itself() {
        let machine = Machine::with(&[]);
        let program = machine.script("agent", b"\x7fELF");
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let command = machine.resolve(&program).unwrap();
        assert_eq!((command.program, command.arguments), (program, vec![]));
    }

    #[test]
    fn what_is_no_readable_file_is_an_error_and_never_waits() {
        let machine = Machine::with(&["bash"]);
        let pipe = machine.directory.path().join("pipe.sh");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &pipe,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RWXU,
            0,
        )
        .unwrap();
        assert!(matches!(
            machine.resolve(&pipe),
            Err(ScriptError::NotAFile { .. })
        ));
        let directory = machine.directory.path().join("bin");
        assert!(matches!(
            machine.resolve(&directory),
            Err(ScriptError::NotAFile { .. })
        ));
        let absent = machine.directory.path().join("absent.sh");
        assert!(matches!(
            machine.resolve(&absent),
            Err(ScriptError::Unreadable { .. })
        ));
    }
}
