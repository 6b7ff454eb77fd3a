import TTTFormats

/// An expression of a template.
indirect enum TemplateExpression: Sendable {
    case value(TemplateValue)
    case name(String)
    case list([TemplateExpression])
    case attribute(TemplateExpression, String)
    case index(TemplateExpression, TemplateExpression)
    case slice(TemplateExpression, TemplateExpression?, TemplateExpression?)
    case not(TemplateExpression)
    case binary(String, TemplateExpression, TemplateExpression)
    case test(TemplateExpression, String)
    case filter(TemplateExpression, String)
    case call(String, [TemplateExpression], [String: TemplateExpression])
    case choice(TemplateExpression, if: TemplateExpression, else: TemplateExpression?)

    func value(_ scope: TemplateScope) throws -> TemplateValue {
        switch self {
        case .value(let value): return value
        case .name(let name): return scope[name]
        case .list(let items): return .list(try items.map { try $0.value(scope) })
        case .attribute(let owner, let name):
            guard case .record(let record) = try owner.value(scope) else { return .undefined }
            return record[name] ?? .undefined
        case .index(let owner, let index): return try Self.item(owner.value(scope), index.value(scope))
        case .slice(let owner, let start, let end):
            return try Self.slice(owner.value(scope), start?.value(scope), end?.value(scope))
        case .not(let expression): return .flag(!(try expression.value(scope).isTrue))
        case .binary(let operation, let left, let right): return try Self.binary(operation, left, right, scope)
        case .test(let expression, let name): return .flag(try Self.test(expression.value(scope), name))
        case .filter(let expression, let name): return try Self.filter(expression.value(scope), name)
        case .call(let name, let arguments, let named):
            if name == "raise_exception" {
                let text = try arguments.first?.value(scope).text ?? ""
                throw TTTError.unsupported("The chat template refuses these messages: \(text)")
            }
            return .record(try named.mapValues { try $0.value(scope) })  // namespace
        case .choice(let first, let condition, let second):
            return try condition.value(scope).isTrue ? first.value(scope) : second?.value(scope) ?? .undefined
        }
    }

    private static func item(_ owner: TemplateValue, _ index: TemplateValue) throws -> TemplateValue {
        switch (owner, index) {
        case (.record(let record), .text(let key)): return record[key] ?? .undefined
        case (.list(let list), .number(let number)):
            let at = number < 0 ? list.count + number : number
            return list.indices.contains(at) ? list[at] : .undefined
        default: return .undefined
        }
    }

    private static func slice(_ owner: TemplateValue, _ start: TemplateValue?, _ end: TemplateValue?) throws -> TemplateValue {
        guard case .list(let list) = owner else { throw TTTError.unsupported("The chat template slices what is no list") }
        func place(_ value: TemplateValue?, _ fallback: Int) -> Int {
            guard case .number(let number)? = value else { return fallback }
            return min(max(number < 0 ? list.count + number : number, 0), list.count)
        }
        let (first, last) = (place(start, 0), place(end, list.count))
        return .list(first < last ? Array(list[first..<last]) : [])
    }

    private static func binary(
        _ operation: String, _ left: TemplateExpression, _ right: TemplateExpression, _ scope: TemplateScope
    ) throws -> TemplateValue {
        let a = try left.value(scope)
        if operation == "and" { return a.isTrue ? try right.value(scope) : a }
        if operation == "or" { return a.isTrue ? a : try right.value(scope) }
        let b = try right.value(scope)
        switch (operation, a, b) {
        case ("==", _, _): return .flag(a == b)
        case ("!=", _, _): return .flag(a != b)
        case ("~", _, _): return .text(a.text + b.text)
        case ("+", .text(let x), .text(let y)): return .text(x + y)
        case ("+", .list(let x), .list(let y)): return .list(x + y)
        case ("in", .text(let x), .text(let y)): return .flag(x.isEmpty || y.contains(x))
        case ("in", .text(let x), .record(let y)): return .flag(y[x] != nil)
        case ("in", _, .list(let y)): return .flag(y.contains(a))
        case (_, .number(let x), .number(let y)): return try numbers(operation, x, y)
        default: throw TTTError.unsupported("The chat template computes \(a.text) \(operation) \(b.text)")
        }
    }

    private static func numbers(_ operation: String, _ x: Int, _ y: Int) throws -> TemplateValue {
        switch operation {
        case "<": return .flag(x < y)
        case ">": return .flag(x > y)
        case "<=": return .flag(x <= y)
        case ">=": return .flag(x >= y)
        case "+": return .number(x &+ y)
        case "-": return .number(x &- y)
        case "*": return .number(x &* y)
        case "%" where y > 0: return .number(x % y < 0 ? x % y + y : x % y)
        default: throw TTTError.unsupported("The chat template computes \(x) \(operation) \(y)")
        }
    }

    private static func test(_ value: TemplateValue, _ name: String) throws -> Bool {
        switch (name, value) {
        case ("defined", _): return value != .undefined
        case ("none", _): return value == .none
        case ("string", .text), ("iterable", .text), ("iterable", .list), ("mapping", .record): return true
        case ("string", _), ("iterable", _), ("mapping", _): return false
        default: throw TTTError.unsupported("The chat template has a test \(name), which is not known here")
        }
    }

    private static func filter(_ value: TemplateValue, _ name: String) throws -> TemplateValue {
        switch (name, value) {
        case ("trim", .text(let text)): return .text(trimmed(text))
        case ("upper", .text(let text)): return .text(text.uppercased())
        case ("lower", .text(let text)): return .text(text.lowercased())
        case ("length", .text(let text)): return .number(text.unicodeScalars.count)
        case ("length", .list(let list)): return .number(list.count)
        default: throw TTTError.unsupported("The chat template has a filter \(name), which is not known here")
        }
    }

    private static func trimmed(_ text: String) -> String {
        var scalars = Substring(text).unicodeScalars
        while let first = scalars.first, first.properties.isWhitespace { scalars.removeFirst() }
        while let last = scalars.last, last.properties.isWhitespace { scalars.removeLast() }
        return String(scalars)
    }
}
