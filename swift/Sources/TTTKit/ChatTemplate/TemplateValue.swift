import TTTFormats

/// A value of a template's expression.
indirect enum TemplateValue: Sendable, Equatable {
    case undefined
    case none
    case flag(Bool)
    case number(Int)
    case text(String)
    case list([TemplateValue])
    case record([String: TemplateValue])

    var isTrue: Bool {
        switch self {
        case .undefined, .none: false
        case .flag(let flag): flag
        case .number(let number): number != 0
        case .text(let text): !text.isEmpty
        case .list(let list): !list.isEmpty
        case .record(let record): !record.isEmpty
        }
    }

    var text: String {
        switch self {
        case .undefined: ""
        case .none: "None"
        case .flag(let flag): flag ? "True" : "False"
        case .number(let number): "\(number)"
        case .text(let text): text
        case .list(let list): "[\(list.map(\.text).joined(separator: ", "))]"
        case .record: "{…}"
        }
    }
}

/// The variables of a template.
struct TemplateScope {
    private var values: [String: TemplateValue]

    init(_ values: [String: TemplateValue]) {
        self.values = values
    }

    var names: [String] { Array(values.keys) }

    subscript(name: String) -> TemplateValue {
        get { values[name] ?? .undefined }
        set { values[name] = newValue }
    }
}
