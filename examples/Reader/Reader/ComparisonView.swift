import SwiftUI
import TTTKit

/// Two states go on with the same line, side by side, or one below the other where there is little room.
struct ComparisonView: View {
    let comparison: Comparison
    let options: TTTOptions

    @State private var prompt = ""
    @Environment(\.dismiss) private var dismiss
    @Environment(\.dynamicTypeSize) private var dynamicTypeSize

    var body: some View {
        let columns =
            dynamicTypeSize.isAccessibilitySize
            ? AnyLayout(VStackLayout(alignment: .leading)) : AnyLayout(HStackLayout(alignment: .top))
        NavigationStack {
            VStack {
                columns {
                    ForEach(comparison.sides) { side in
                        VStack(alignment: .leading) {
                            Text(side.title).font(.headline).accessibilityAddTraits(.isHeader)
                            ScrollView {
                                Text(side.text)
                                    .textSelection(.enabled)
                                    .frame(maxWidth: .infinity, alignment: .leading)
                            }
                        }
                    }
                }
                if let problem = comparison.problem { ProblemText(problem: problem) }
                HStack {
                    TextField("A line for both", text: $prompt).textFieldStyle(.roundedBorder)
                    if comparison.isWriting {
                        Button("Stop", systemImage: "stop.fill", action: comparison.stop)
                    } else {
                        Button("Go on", systemImage: "play.fill") { comparison.start(prompt, options: options) }
                    }
                }
            }
            .padding()
            .navigationTitle("Side by side")
            .toolbar {
                Button("Done") {
                    comparison.stop()
                    dismiss()
                }
            }
        }
    }
}
