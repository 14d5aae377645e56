//! What a module is made of and what making it took, kept beside its compiled form.

/// What a module's limits are measured against, for as long as it is loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Made {
    /// Its size as it lies in its file, in bytes.
    pub bytes: u64,
    /// Functions it defines.
    pub functions: u64,
    /// Names it imports and exports.
    pub names: u64,
    /// Instances of core modules that a run makes.
    pub instances: u64,
    /// Memories that a run makes.
    pub memories: u64,
    /// Tables that a run makes.
    pub tables: u64,
    /// Wall time that compiling took, when it was compiled, in milliseconds.
    pub compile_milliseconds: u64,
    /// The most that the compiler had mapped, in bytes; 0 where it was not a process of its own.
    pub compile_memory_bytes: u64,
}

impl Made {
    /// What the compiling process tells of the module, as one line.
    pub(super) fn told(&self) -> String {
        format!(
            "{} {} {} {}",
            self.functions, self.names, self.instances, self.compile_memory_bytes
        )
    }

    /// What [`told`](Self::told) says.
    pub(super) fn from_told(line: &str) -> Option<Self> {
        let [functions, names, instances, compile_memory_bytes] = numbers(line)?;
        Some(Self {
            functions,
            names,
            instances,
            compile_memory_bytes,
            ..Self::default()
        })
    }

    /// What the cache keeps: all that cannot be read from the compiled form or the file.
    pub(super) fn note(&self) -> String {
        format!("{} {}", self.told(), self.compile_milliseconds)
    }

    /// What [`note`](Self::note) says.
    pub(super) fn from_note(line: &str) -> Option<Self> {
        let [
            functions,
            names,
            instances,
            compile_memory_bytes,
            compile_milliseconds,
        ] = numbers(line)?;
        Some(Self {
            functions,
            names,
            instances,
            compile_milliseconds,
            compile_memory_bytes,
            ..Self::default()
        })
    }
}

/// As many numbers as a line has, if they are so many.
fn numbers<const COUNT: usize>(line: &str) -> Option<[u64; COUNT]> {
    let numbers: Result<Vec<u64>, _> = line.split_whitespace().map(str::parse).collect();
    numbers.ok()?.try_into().ok()
}

/// The most that this process has had mapped, in bytes; 0 where the system does not say.
pub(super) fn peak_of_this_process() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let kib = status.lines().find_map(|line| {
        let value = line.strip_prefix("VmPeak:")?.trim().strip_suffix("kB")?;
        value.trim().parse::<u64>().ok()
    });
    kib.unwrap_or_default().saturating_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_noted_is_read_again_and_nothing_else() {
        let made = Made {
            functions: 7,
            names: 6,
            instances: 5,
            compile_milliseconds: 3,
            compile_memory_bytes: 2 << 30,
            ..Made::default()
        };
        assert_eq!(Made::from_note(&made.note()), Some(made));
        let told = Made {
            compile_milliseconds: 0,
            ..made
        };
        assert_eq!(Made::from_told(&made.told()), Some(told));
        for line in ["", "1 2 3", "1 2 3 4 5 6", "1 2 3 4 x", "-1 2 3 4 5"] {
            assert_eq!(Made::from_note(line), None, "{line}");
        }
        assert!(peak_of_this_process() > 1 << 20);
    }
}
