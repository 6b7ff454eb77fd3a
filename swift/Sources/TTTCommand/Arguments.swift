import TTTKit

/// The arguments of a command: `--name VALUE` pairs and the words between them.
struct Arguments {
    private(set) var words: [String] = []
    private var values: [String: String] = [:]

    /// - Parameter names: the options that there are, without dashes.
    init(_ arguments: [String], names: Set<String>) throws {
        var rest = arguments[...]
        while let argument = rest.popFirst() {
            guard argument.hasPrefix("--") else {
                words.append(argument)
                continue
            }
            let parts = argument.dropFirst(2).split(separator: "=", maxSplits: 1, omittingEmptySubsequences: false)
            let name = String(parts[0])
            guard names.contains(name) else { throw TTTError.invalidOption("There is no option --\(name)") }
            guard let value = parts.count > 1 ? String(parts[1]) : rest.popFirst() else {
                throw TTTError.invalidOption("--\(name) needs a value")
            }
            values[name] = value
        }
    }

    func text(_ name: String) -> String? {
        values[name]
    }

    func required(_ name: String) throws -> String {
        guard let value = values[name] else { throw TTTError.invalidOption("--\(name) is missing") }
        return value
    }

    func value<Value: LosslessStringConvertible>(_ name: String, default fallback: Value) throws -> Value {
        guard let text = values[name] else { return fallback }
        guard let value = Value(text) else { throw TTTError.invalidOption("--\(name) is \(text), expected a number") }
        return value
    }
}
